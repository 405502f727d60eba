// Tests of the response cache: what it answers, for whom and how, what it never stores, one flight for identical calls,
// what is on disk, and what a purge leaves.
package main

import (
	"context"
	"strings"
	"testing"
)

// enableCache gives the test's project a cache. members are added to its policy.
func (p *testProxy) enableCache(members ...string) {
	p.t.Helper()
	cache := strings.Join(append([]string{`"ttl_seconds":3600`}, members...), ",")
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"cache":{`+cache+`}}}`, 200, nil)
}

// cachedChat makes a chat call that may be cached. headers are pairs of name and value.
func (p *testProxy) cachedChat(token, members string, headers ...string) testResponse {
	p.t.Helper()
	body := chatBody(`"temperature":0`)
	if members != "" {
		body = chatBody(`"temperature":0`, members)
	}
	return p.do("POST", "/v1/chat/completions", body,
		append([]string{"Authorization", "Bearer " + token, "Content-Type", "application/json"}, headers...)...)
}

// lastRow returns the row of the newest call as stored.
func (p *testProxy) lastRow() requestView {
	p.t.Helper()
	all := p.allRequests()
	if len(all) == 0 {
		p.t.Fatal("the ledger has no row")
	}
	newest := all[0]
	for _, r := range all {
		if r.id > newest.id {
			newest = r
		}
	}
	return newest
}

// cacheSettled waits until everything that is to be cached is on disk.
func (p *testProxy) cacheSettled() {
	p.t.Helper()
	p.waitSettled()
	c := p.instance.cache
	waitFor(p.t, "the cache to be written", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.queue) == 0 && c.written.Load()+c.dropped.Load() >= c.stored.Load()
	})
}

// TestCacheHit: the second identical call is answered with the same bytes, without the provider, from memory and after
// a restart from the disk. It has a row of its own, with zero tokens and cost and what it saved.
func TestCacheHit(t *testing.T) {
	t.Parallel()
	for _, members := range []string{"", `"stream":true`, `"stream":true,"stream_options":{"include_usage":true}`} {
		p := newTest(t, nil)
		p.enableCache()
		first := p.cachedChat(p.token, members)
		if got := first.header.Get("Cache-Status"); first.status != 200 || got != "llm-proxy; fwd=miss; stored" {
			t.Fatalf("%s: got %d %q %s", members, first.status, got, first.body)
		}
		miss := p.lastCall()
		p.cacheSettled()
		for _, from := range []string{"memory", "disk", "memory again"} {
			if from == "disk" {
				if err := p.stop(); err != nil {
					t.Fatal(err)
				}
				p.start()
			}
			hit := p.cachedChat(p.token, members)
			status := hit.header.Get("Cache-Status")
			if hit.status != 200 || hit.body != first.body || !strings.HasPrefix(status, "llm-proxy; hit; ttl=3") ||
				!strings.Contains(status, `; key="`) || hit.header.Get("Age") == "" ||
				hit.header.Get("Content-Type") != first.header.Get("Content-Type") ||
				hit.header.Get("Cache-Control") != first.header.Get("Cache-Control") ||
				hit.header.Get("X-Request-Id") == first.header.Get("X-Request-Id") ||
				hit.header.Get("X-Request-Id") != hit.header.Get("X-Llm-Proxy-Request-Id") {
				t.Fatalf("%s from %s: got %d %v\n%q, want\n%q",
					members, from, hit.status, hit.header, hit.body, first.body)
			}
			row := p.lastCall()
			if row.Outcome != "ok" || row.InputTokens+row.OutputTokens != 0 || row.Cost == nil || *row.Cost != 0 ||
				row.Attempts != 0 || row.UsageSource != "none" || row.Model != miss.Model ||
				row.Stream != (members != "") {
				t.Errorf("%s from %s: the row is %+v", members, from, row)
			}
			if v := p.lastRow(); v.cache != "hit" || v.saved == 0 || v.saved != int64(*miss.Cost*1e9+0.5) {
				t.Errorf("%s from %s: the row has cache %q and saved %d; the miss cost %v",
					members, from, v.cache, v.saved, *miss.Cost)
			}
		}
		if n := len(p.provider.received()); n != 1 {
			t.Errorf("%s: the provider got %d calls", members, n)
		}
		p.checkSums()
	}
}

// purgeCache purges what f describes of the test's project.
func (p *testProxy) purgeCache(f cacheFilter) int64 {
	p.t.Helper()
	f.project = p.projectSeq()
	n, err := p.instance.cache.purge(context.Background(), f)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

func (p *testProxy) projectSeq() int64 {
	p.t.Helper()
	row, err := p.instance.store.projectByID(context.Background(), p.project)
	if err != nil {
		p.t.Fatal(err)
	}
	return row.seq
}
