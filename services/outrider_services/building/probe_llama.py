"""Decode batches of 1, 2 and 16 rows with the model file given: a miscompiled library dies here.

gcc before 14 drops the stores that configure AMX tiles, which a single row does not use.
"""

import ctypes
import math
import os
import sys

import llama_cpp.llama_cpp as llama

ROWS = (1, 2, 16)


def main(path: str) -> None:
    silence = llama.llama_log_callback(lambda level, text, data: None)  # a name keeps it alive
    llama.llama_log_set(silence, None)
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    nothing_else = (ctypes.c_void_p * 1)()  # a list without a device: the processor alone
    model_params.devices = ctypes.addressof(nothing_else)
    model = llama.llama_model_load_from_file(path.encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = min(2, os.cpu_count() or 1)
    context = llama.llama_init_from_model(model, params)
    if not context:
        sys.exit("the model could not be loaded")
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    for rows in ROWS:
        tokens = (ctypes.c_int32 * rows)(*range(1, rows + 1))
        if status := llama.llama_decode(context, llama.llama_batch_get_one(tokens, rows)):
            sys.exit(f"decoding {rows} rows failed with status {status}")
        logits = llama.llama_get_logits_ith(context, -1)[:vocab_size]
        if not all(map(math.isfinite, logits)) or max(logits) == min(logits):
            sys.exit(f"decoding {rows} rows gave no usable numbers")


if __name__ == "__main__":
    main(*sys.argv[1:])
