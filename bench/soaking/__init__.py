"""The parts of soak.py; see there."""
