"""The serving bench: its contestants, workload and arithmetic. serve.py beside this folder runs it."""
