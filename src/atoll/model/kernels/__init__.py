"""The compiled CPU forward: the same contract as model/decoder.py in one call, several times faster. Optional: without a compiler plain torch runs.

build.py compiles and caches the library, decoder.py is what the engine holds instead of a Decoder, bank.py keeps resident adapters in the library's
layout. The C++ is beside them: decoder.cpp the forward, product.h its one product, adapter.h the updates; threads.h, simd.h and amx.h carry them.
"""
