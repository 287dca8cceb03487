"""Methods, a function a file by kind; `registry` is the table of them."""
