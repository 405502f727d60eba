//go:build !postgres

// These helpers stand in for those of store_postgres_test.go in a build without PostgreSQL.
package main

import "testing"

func usesTestDatabase() bool { return false }

func newTestDatabase(testing.TB) string { return "" }

func dumpTestDatabase(testing.TB, string) []byte { return nil }
