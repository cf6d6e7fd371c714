"""llama.cpp, through `llama-cpp-python`: sequences in and out by its state interface, and an engine over it.

`gguf_file.py` writes the GGUF file of a Hugging Face directory; `docs/other-engines.md` says how to use all this.
May import: hetkv, hetkv.integrations, llama_cpp, gguf.
"""
