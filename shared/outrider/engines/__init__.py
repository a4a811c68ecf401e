"""Models behind the protocols of `outrider.core`: a toy language, and GGUF files by llama.cpp."""
