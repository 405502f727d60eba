//go:build postgres

// These tests run several replicas on one PostgreSQL database, in one process.
package main

import (
	"strings"
	"testing"
	"time"
)

// everywhere is how long a change may take to hold at all replicas.
const everywhere = time.Second

// waitEverywhere waits until ok holds at each of the replicas, for at most as long as a change may take.
func waitEverywhere(t *testing.T, what string, replicas []*testProxy, ok func(p *testProxy) bool) {
	t.Helper()
	began := time.Now()
	for i, p := range replicas {
		waitFor(t, what, func() bool { return ok(p) })
		if took := time.Since(began); took > everywhere {
			t.Errorf("%s: replica %d after %s", what, i+1, took)
		}
	}
}

// TestClusterStarts: replicas answer calls with one database, each has a slot of its own, and exactly one leads.
func TestClusterStarts(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	slots := map[int64]bool{}
	for _, p := range all {
		if res := p.chat(); res.status != 200 {
			t.Errorf("got %d %s", res.status, res.body)
		}
		slots[p.instance.store.backend.slot()] = true
	}
	if len(slots) != len(all) {
		t.Errorf("slots: %v", slots)
	}
	waitFor(t, "one leader", func() bool { return countLeaders(all) == 1 })
	if err := all[0].stop(); err != nil { // it leads
		t.Fatal(err)
	}
	began := time.Now()
	waitFor(t, "another leader", func() bool { return countLeaders(all[1:]) == 1 })
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the leader was replaced after %s", took)
	}
}

func countLeaders(all []*testProxy) (n int) {
	for _, p := range all {
		if p.instance.store.isLeader() {
			n++
		}
	}
	return n
}

// TestClusterChanges: what an administrator changes at one replica holds at all of them within a second.
func TestClusterChanges(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	a, others := all[0], all[1:]
	status := func(p *testProxy, token string, want int) bool { return p.chatAs(token).status == want }

	// A token that was tried before it existed.
	value, public := mintCredential(tokenPrefix, "")
	for _, p := range all {
		if !status(p, value(), 401) {
			t.Error("an unknown token was admitted")
		}
	}
	now := time.Now().UnixMilli()
	if err := a.instance.store.addToken(t.Context(), systemOrigin(time.Now()), &tokenRow{id: "tok_" + public,
		projectID: a.project, name: "late", policy: "{}", hash: hashMinted(value), createdAt: now,
		updatedAt: now}); err != nil {
		t.Fatal(err)
	}
	waitEverywhere(t, "a new token", all, func(p *testProxy) bool { return status(p, value(), 200) })

	id, token := a.newToken(`"name":"changed"`)
	for _, p := range all {
		if !status(p, token, 200) {
			t.Fatal("a token was refused")
		}
	}
	a.manage("PATCH", "/manage/tokens/"+id, `{"policy":{"models":["other-*"]}}`, 200, nil)
	waitEverywhere(t, "a changed policy", others, func(p *testProxy) bool { return status(p, token, 403) })
	a.manage("PATCH", "/manage/tokens/"+id, `{"policy":{}}`, 200, nil)
	waitEverywhere(t, "the policy again", others, func(p *testProxy) bool { return status(p, token, 200) })
	var rotated struct{ Token string }
	a.manage("POST", "/manage/tokens/"+id+"/rotate", `{"overlap_minutes":0}`, 200, &rotated)
	waitEverywhere(t, "a rotated token", others, func(p *testProxy) bool { return status(p, token, 401) })
	for _, p := range all {
		p.secrets = append(p.secrets, rotated.Token)
		if !status(p, rotated.Token, 200) {
			t.Error("the new value of a token was refused")
		}
	}

	a.changeProject(`"is_active":false`)
	waitEverywhere(t, "a deactivated project", others, func(p *testProxy) bool { return status(p, p.token, 403) })
	a.changeProject(`"is_active":true`)
	waitEverywhere(t, "the project again", others, func(p *testProxy) bool { return status(p, p.token, 200) })
	a.changeUpstream(a.upstream, `"api_key":"sk-provider-other-0123456789abcdefghijklmnop"`)
	waitEverywhere(t, "a rotated provider key", others, func(p *testProxy) bool {
		return status(p, p.token, 200) && strings.Contains(a.provider.lastRequest(t).head, "sk-provider-other")
	})
	a.manage("POST", "/manage/prices", `{"match":"gpt-4o-mini*","input":1000,"output":1000}`, 201, nil)
	waitEverywhere(t, "a price", others, func(p *testProxy) bool {
		return status(p, p.token, 200) && *p.lastCall().Cost == 0.012
	})
	browserOfA := a.signIn(a.adminKey)
	for _, p := range others {
		if b := (&browser{p: p, cookie: browserOfA.cookie}); !b.isSignedIn() {
			t.Error("a session of one replica is none at another")
		}
	}
	a.manage("POST", "/manage/projects/"+a.project+"/tokens/revoke", "", 200, nil)
	waitEverywhere(t, "all tokens revoked", others, func(p *testProxy) bool { return status(p, p.token, 401) })
}

// TestClusterRevokesStreams: running calls at all replicas end when their token is revoked at one of them.
func TestClusterRevokesStreams(t *testing.T) {
	requirePostgres(t)
	all := newReplicas(t, 3, nil)
	all[0].provider.setScript(func(c *providerConn, r recordedRequest) bool {
		c.beginSSE()
		_ = c.chunk(chatEvents(false)[0])
		return !c.waitClosed(20 * time.Second)
	})
	var streams []*clientStream
	for _, p := range all {
		streams = append(streams, p.stream(p.token))
	}
	for _, s := range streams {
		if _, err := s.read(20); err != nil {
			t.Fatal(err)
		}
	}
	all[0].manage("DELETE", "/manage/tokens/"+all[0].tokenID, "", 200, nil)
	began := time.Now()
	for i, s := range streams {
		if _, err := s.readAll(); err == nil {
			t.Error("a stream ended as if it were complete")
		}
		if took := time.Since(began); took > everywhere {
			t.Errorf("the stream of replica %d ended after %s", i, took)
		}
	}
}
