"""Random transformers out of the choices that real ones make, for laws that thousands of them try to break."""
