"""What every room may use: errors, files, untrusted input, versions of other packages."""
