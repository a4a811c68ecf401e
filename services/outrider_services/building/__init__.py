"""Building llama.cpp for this machine; its modules need nothing but Python itself.

So `scripts/setup` can use them before anything is installed.
"""
