"""Other people's formats: parameters of networks, and adapters, in and out."""
