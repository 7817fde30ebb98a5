"""Other libraries' names and arguments, served by qcore: ``bitsandbytes``, ``torch_bnb_fp4``."""
