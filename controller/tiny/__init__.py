"""How the embedded tiny backbone is made from nothing."""
