//go:build postgres

// These tests check limits that several replicas share, with real replicas on one PostgreSQL database.
package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestLeasesOfReplicas: of 150 calls at once over three replicas, exactly as many as a limit allows reach the provider,
// whatever it counts and whoever has made calls before.
func TestLeasesOfReplicas(t *testing.T) {
	requirePostgres(t)
	replicas := newReplicas(t, 3, map[string]string{"LOG_LEVEL": "error"})
	p := replicas[0]
	awaitClearOfHour(20 * time.Second)
	for i, c := range []struct {
		limit string
		want  int64
	}{
		{`"policy":{"limits":[{"count":"requests","max":20,"per":"day"}]}`, 20},
		{`"policy":{"limits":[{"count":"requests","max":20,"per":"lifetime","for_each":"end_user"}]}`, 20},
		{`"policy":{"limits":[{"count":"requests","max":20,"per":"hour","model":"gpt-4o*"}]}`, 20},
		{`"max_requests":7`, 7},
	} {
		_, token := p.newToken(fmt.Sprintf(`"name":"shared %d",%s`, i, c.limit))
		var answered atomic.Int64
		var clients sync.WaitGroup
		for n := range 150 {
			clients.Go(func() {
				if status, _ := replicas[n%3].send(nil, token, chatBody(`"max_tokens":10`)); status == 200 {
					answered.Add(1)
				}
			})
		}
		clients.Wait()
		if n := answered.Load(); n != c.want {
			t.Errorf("%s: %d calls were answered, want %d", c.limit, n, c.want)
		}
	}
}
