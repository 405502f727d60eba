// This file declares the fields that administrators send. A page of /admin uses the same inputs.
package main

// given is an optional with a value.
func given[T any](value T) optional[T] { return optional[T]{set: true, value: value} }
