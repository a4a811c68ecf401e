"""The processes of outrider and the command that starts them."""
