"""The theorems: numbers and arrays in, numbers out."""
