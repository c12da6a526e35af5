"""What there is: the papers, and the networks that implement them."""
