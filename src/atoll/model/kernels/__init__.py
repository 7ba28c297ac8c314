"""The compiled CPU forward: the same contract as model/decoder.py in one call, several times faster. Optional: without a compiler plain torch runs.

build.py compiles and caches the library, decoder.py is what the engine holds instead of a Decoder, bank.py keeps resident adapters in the library's
layout. The C++ is beside them: library.cpp is the door, forward.h the forward, product.h its one product, adapter.h LoRA's updates, edits.h
ReFT's edits, head.h and sampling.h what follows it; shape.h and model.h hold sizes and weights; threads.h, simd.h and amx.h carry it all.
"""
