"""The catalog of papers, and of the networks that implement them."""
