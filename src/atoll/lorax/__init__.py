"""LoRAX's HTTP API: generate, generate_stream, embed, classify, tokenize, info, and Predibase's path.

The one idea: bodies, rules and replies are LoRAX's field by field, so that its clients work unchanged; what a request does is serving's.

Used by server/app.py.
"""
