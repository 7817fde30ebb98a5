"""Other libraries' models with qcore's layers in them."""
