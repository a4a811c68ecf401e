"""What crosses a process border: the messages, their bytes, and the sockets."""
