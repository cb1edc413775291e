"""What tests and benchmarks stand on: hosts, operators, engines and servers made for them."""
