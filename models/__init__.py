"""What a quantized FLUX is: quantizers, quantized linears and the transformer built from them."""
