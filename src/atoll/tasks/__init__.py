"""The built-in tasks: seeded generators with disjoint parts and held-out words, for demo, tests, and a first try without data of one's own."""
