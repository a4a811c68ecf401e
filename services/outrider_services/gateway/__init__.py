"""The gateway: OpenAI's and llama.cpp's HTTP, for a pipeline of which it is a client."""
