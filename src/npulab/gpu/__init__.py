"""What a GPU can do, measured without being fooled: experiments, what is concluded from them, devices that do them."""
