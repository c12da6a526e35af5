"""Networks, one file per paper, by what goes in. A file registers its variants; `create_model` finds them by name."""
