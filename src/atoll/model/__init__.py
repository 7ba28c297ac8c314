"""The shared forward and the adapter algebra: every stage builds a PackedBatch and an AdapterBatch and calls the decoder here."""
