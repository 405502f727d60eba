//go:build !postgres

// This file stands in for store_postgres.go in a binary without PostgreSQL: it says how to get the other one. It may
// do nothing else.
package main

import (
	"context"
	"errors"
)

var errNoPostgres = errors.New("names PostgreSQL, but this binary has no support for it; use the image " +
	"llm-proxy:postgres, or build it with: go build -tags postgres")

func openPostgres(context.Context, *postgresConfig, bool) (*store, error) { return nil, errNoPostgres }

func copyToPostgres(context.Context, *store, *store, func(string, int64)) error { return errNoPostgres }

func endCopy(context.Context, *store) error { return errNoPostgres }

func checkPostgresURL(string) (name string, warnings []string, err error) {
	return "", nil, errNoPostgres
}
