"""The built-in tasks: seeded generators with disjoint parts and held-out words, for the demo, the tests, and a first try without data of one's own."""
