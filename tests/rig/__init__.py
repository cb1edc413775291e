"""What the tests stand on: hosts, operators, engines and servers made for them."""
