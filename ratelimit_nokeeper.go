//go:build !postgres

// This file stands in for ratelimit_keeper.go in a binary without PostgreSQL: one process counts alone, and nothing is
// leased. It may do nothing else.
package main

import (
	"context"
	"log/slog"
	"sync/atomic"
)

type (
	leaseWait   struct{}
	leaseKeeper struct{ now func() int64 }
)

func newLimitState(st *store, l *ledger, g *registry, prices *atomic.Pointer[priceTable]) *limitState {
	return &limitState{store: st, ledger: l, registry: g, prices: prices}
}

func (k *leaseKeeper) touch(*limitCounter) {}

func (k *leaseKeeper) retire(*limitCounter) {}

func (k *leaseKeeper) recall(string) {}

func (k *leaseKeeper) count() int64 { return 0 }

func (k *leaseKeeper) replace(*limitCounter) *limitCounter { return nil }

func (ls *limitState) run(context.Context) {}

func (ls *limitState) returnLeases(context.Context, *slog.Logger) {}

func (ls *limitState) lease(*leaseWait, *liveToken, *estimate, int64) (bool, error) { return true, nil }

func (ls *limitState) refreshLeases(*limiter, *limitScope) error { return nil }

func (ls *limitState) syncLifetime(*liveToken, *tokenState, leaseOwner, int64) {}

func (ls *limitState) lateUses(*requestRow, [2][]limit) []lateLeaseUse { return nil }

func (ls *limitState) forgetRefusals(*liveProject, int64) {}

func (ls *limitState) policyChanged(context.Context, leaseOwner, string, bool) error { return nil }

func (ls *limitState) pruneAccounts(context.Context, int64) error { return nil }

// reserveRequest counts a call in the token's lifetime limit; a negative one means none.
func (ls *limitState) reserveRequest(t *liveToken, r *reservation, maxRequests, now int64) error {
	if !t.reserve(r, maxRequests, now) {
		return requestsExhausted(maxRequests)
	}
	return nil
}
