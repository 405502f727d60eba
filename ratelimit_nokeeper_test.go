//go:build !postgres

package main

// testLeaseKeeper returns a keeper that exchanges nothing.
func testLeaseKeeper(now func() int64) *leaseKeeper { return &leaseKeeper{now: now} }
