// Tests of limits through time (LI1, LI8, LI14): restarts, crashes, evictions,
// a database that is locked, and administrators who change limits while calls
// run. A window of an hour or more is exact through all of them.
package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// windows are limits of 20 calls, each of 12 tokens and $0.00000315, over every
// window. The last leaves room for what the last call sets aside.
func windows(kind string) (out []string) {
	for per := perHour; per <= perLifetime; per++ {
		most := map[string]string{"requests": "20", "tokens": fmt.Sprint(19*12 + 30), "dollars": fmt.Sprintf("0.%09d", 19*3150+5_000)}[kind]
		out = append(out, fmt.Sprintf(`{"count":%q,"max":%s,"per":%q}`, kind, most, per))
	}
	return out
}

// tinyBody needs 26 tokens at most, and 1 of its answer.
const tinyBody = `"max_tokens":1`

// spend makes calls, from n clients at once, until each was refused once, and
// returns how many were answered.
func (p *testProxy) spend(token string, n, most int) (answered int) {
	var mu sync.Mutex
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			for range most {
				_, status := p.callFree(context.Background(), token, tinyBody)
				mu.Lock()
				if status == 200 {
					answered++
				}
				mu.Unlock()
				if status != 200 {
					return
				}
			}
		})
	}
	all.Wait()
	return answered
}

// TestWindowsSurvive: what was used before a restart, a kill -9 or an eviction is
// used after it, of tokens and projects, to the last call.
func TestWindowsSurvive(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"requests", "tokens", "dollars"} {
		for _, where := range []string{"token", "project"} {
			for _, how := range []string{"restart", "kill", "eviction"} {
				t.Run(strings.Join([]string{kind, where, how}, " "), func(t *testing.T) {
					t.Parallel()
					p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
					calm(10 * time.Second)
					paths, tokens := map[string]string{}, map[string]string{}
					for i, limit := range windows(kind) {
						own, its := `{"limits":[`+limit+`]}`, `{}`
						if where == "project" {
							own, its = its, own
						}
						project, made, ids := p.newProject(fmt.Sprint("p", i), its, own, 1)
						tokens[limit], paths[limit] = made[0], "/manage/tokens/"+ids[0]
						if where == "project" {
							paths[limit] = "/manage/projects/" + project
						}
						if n := p.spend(made[0], 1, 7); n != 7 {
							t.Fatalf("%s: %d of 7 calls were answered", limit, n)
						}
					}
					p.settle()
					q := p
					switch how {
					case "restart":
						if err := p.stop(); err != nil {
							t.Fatal(err)
						}
						p.start()
					case "kill":
						q = p.asAfterCrash()
					case "eviction":
						p.in.registry.evict(time.Now().Add(time.Hour).UnixMilli(), true)
					}
					for limit, token := range tokens {
						before := q.limits(paths[limit])[0] // of a token that no call has used yet
						n := q.spend(token, 4, 20)
						if min := map[string]int{"requests": 13, "tokens": 10, "dollars": 10}[kind]; n > 13 || n < min {
							t.Errorf("%s: after 7 calls, %d of 13 more were answered", limit, n)
						}
						unit := map[string]float64{"requests": 1, "tokens": 12, "dollars": 3150e-9}[kind]
						after := q.limits(paths[limit])[0]
						if fmt.Sprintf("%.9f", before.Used) != fmt.Sprintf("%.9f", 7*unit) || fmt.Sprintf("%.9f", after.Used) != fmt.Sprintf("%.9f", float64(7+n)*unit) {
							t.Errorf("%s: %+v, and after %d calls more %+v", limit, before, n, after)
						}
					}
				})
			}
		}
	}
}

// TestKilledAmidCalls: calls that ran when the program was killed count, for
// nobody knows that the provider did not have them; in tokens, by the estimate.
func TestKilledAmidCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	calm(10 * time.Second)
	path, token := p.policyToken(`{"count":"requests","max":10,"per":"hour"},{"count":"requests","max":10,"per":"lifetime","endpoint":"/v1/chat/*"},` +
		`{"count":"tokens","max":100000,"per":"day","model":"gpt-4o-mini"},{"count":"concurrent","max":5}`)
	if n := p.spend(token, 1, 3); n != 3 {
		t.Fatalf("%d of 3 calls were answered", n)
	}
	p.settle()
	p.provider.answer(endless)
	for range 5 {
		if _, err := p.stream(token, `"max_tokens":50`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	q := p.asAfterCrash()
	p.provider.answer(answerChat)
	l := q.limits(path)
	if l[0].Used != 8 || l[1].Used != 8 || l[2].Used < 3*12+5*50 || l[2].Used > 3*12+5*100 || l[3].Used != 0 {
		t.Errorf("after the kill: %+v", l)
	}
	if n := q.spend(token, 1, 20); n != 2 {
		t.Errorf("after the kill %d calls were answered, 2 were left", n)
	}
}

// TestLimitsChangeUnderLoad (LI8): while clients call without a pause, an
// administrator raises a limit, lowers it, takes it away and puts it back. Each
// holds from the answer to the change on, and no count starts anew.
func TestLimitsChangeUnderLoad(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"token", "project"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			calm(20 * time.Second)
			project, tokens, ids := p.newProject("load", `{}`, `{}`, 2)
			token, path := tokens[0], "/manage/tokens/"+ids[0]
			if where == "project" {
				path = "/manage/projects/" + project
			}
			set := func(limits string) {
				p.manage("PATCH", path, `{"policy":{"limits":[`+limits+`]}}`, 200, nil)
			}
			stop := make(chan struct{})
			var clients sync.WaitGroup
			for range 6 {
				clients.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
							if _, status := p.callFree(context.Background(), token, tinyBody); status != 200 && status != 429 {
								t.Errorf("got %d", status)
							}
						}
					}
				})
			}
			used := func() int { return len(p.provider.got()) }
			const day, lifetime = `{"count":"requests","max":%d,"per":"day"}`, `{"count":"requests","max":%d,"per":"lifetime"}`
			for round := range 4 {
				waitFor(t, "calls", func() bool { return used() >= (round+1)*30 })
				set("") // calls are running that no limit knows of
				waitFor(t, "calls without a limit", func() bool { return used() >= (round+1)*30+10 })
				n := used() + 40
				kind := day
				if round%2 == 1 {
					kind = lifetime
				}
				set(fmt.Sprintf(kind, n)) // counts all from before, to the call
				waitFor(t, "the limit", func() bool { return used() >= n })
				set(fmt.Sprintf(kind, n-20))                                                  // lowered: refuses, and keeps the count
				set(fmt.Sprintf(kind, n+5))                                                   // raised by 5
				set(fmt.Sprintf(kind, n+5) + `,{"count":"requests","max":1000,"per":"hour"}`) // and another one beside it
				waitFor(t, "the raised limit", func() bool { return used() >= n+5 })
				set(fmt.Sprintf(kind, n+5) + `,{"count":"concurrent","max":0,"model":"gpt-5*"}`)
				time.Sleep(20 * time.Millisecond) // in which clients try
				if got := used(); got != n+5 {
					t.Fatalf("round %d: the provider got %d calls, the limit is %d", round, got, n+5)
				}
				set(fmt.Sprintf(kind, n+10_000))
			}
			close(stop)
			clients.Wait()
			set(fmt.Sprintf(day, 1) + `,{"count":"tokens","max":1,"per":"month"},` + fmt.Sprintf(lifetime, 1))
			p.settle()
			l, n := p.limits(path), float64(used())
			if l[0].Used != n || l[1].Used != 12*n || l[2].Used != n {
				t.Errorf("after %v calls: %+v", n, l)
			}
			p.sumsAgree()
			p.countsAgree()
		})
	}
}

// TestLimitAddedAmidCalls (LI8): a limit that is added while calls run counts
// them: requests at once, what they set aside, and their places.
func TestLimitAddedAmidCalls(t *testing.T) {
	t.Parallel()
	p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
	calm(10 * time.Second)
	p.provider.answer(endless)
	for range 4 {
		if _, err := p.stream(p.token, `"max_tokens":70`).read(1); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"/manage/tokens/" + p.tokenID, "/manage/projects/" + p.project} {
		p.manage("PATCH", path, `{"policy":{"limits":[{"count":"requests","max":5,"per":"day"},{"count":"concurrent","max":5},
			{"count":"tokens","max":500,"per":"month"},{"count":"requests","max":9,"per":"day","model":"gpt-5*"}]}}`, 200, nil)
		l := p.limitsNow(path)
		if l[0].Used != 4 || l[1].Used != 4 || l[2].Reserved+l[2].Used < 4*70 || l[3].Used != 0 {
			t.Errorf("%s: %+v", path, l)
		}
	}
	p.provider.answer(answerChat)
	if n := p.spend(p.token, 4, 3); n != 1 {
		t.Errorf("beside 4 running calls %d were answered, 1 was left", n)
	}
}

// TestImpatientCalls (LI14): calls that wait for the ledger for too long are
// refused without ever being forwarded. They do not count, whether the ledger
// writes them later or not at all.
func TestImpatientCalls(t *testing.T) {
	t.Parallel()
	for _, busy := range []int{50, 3000} { // the write fails before the lock is gone; or waits for it
		t.Run(fmt.Sprint(busy), func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			p.allowErrors = true
			p.in.running.mu.Lock()
			p.in.running.limits.ledgerPatience = 200 * time.Millisecond
			p.in.running.mu.Unlock()
			calm(20 * time.Second)
			id, token := p.newToken(`"name":"l","max_requests":12,"policy":{"limits":[{"count":"requests","max":12,"per":"day"}]}`)
			if n := p.spend(token, 1, 2); n != 2 {
				t.Fatalf("%d of 2 calls were answered", n)
			}
			p.settle()
			p.pragma(fmt.Sprintf(`PRAGMA busy_timeout = %d`, busy))
			release := p.lockDatabase()
			if statuses := p.burst(token, 8); statuses[503] != 8 {
				t.Errorf("while it was locked clients got %v", statuses)
			}
			release()
			waitFor(t, "the ledger", p.in.ledger.healthy)
			p.settle()
			if n := p.count(id); n != 2 || len(p.provider.got()) != 2 {
				t.Errorf("the count is %d after %d calls", n, len(p.provider.got()))
			}
			p.countsAgree()
			if n := p.spend(token, 3, 20); n != 10 {
				t.Errorf("of 10 calls that were left %d were answered", n)
			}
			p.countsAgree()
		})
	}
}

// TestLockedDatabase (LI14): while the database takes no write, calls are refused
// with 503 and nothing is unlimited; and what was refused does not count after.
func TestLockedDatabase(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]string{
		"a day's requests":   `{"count":"requests","max":10,"per":"day"}`,
		"a second's":         `{"count":"requests","max":10,"per":"second"}`,
		"a lifetime's money": `{"count":"dollars","max":0.000100,"per":"lifetime"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
			p.allowErrors = true
			calm(10 * time.Second)
			id, token := p.newToken(`"name":"l","max_requests":20,"policy":{"limits":[` + limit + `]}`)
			if n := p.spend(token, 1, 2); n != 2 {
				t.Fatalf("%d of 2 calls were answered", n)
			}
			p.settle()
			p.pragma(`PRAGMA busy_timeout = 20`)
			hits := len(p.provider.got())
			release := p.lockDatabase()
			statuses := p.burst(token, 50)
			if statuses[200] != 0 || statuses[503] == 0 || statuses[503]+statuses[429] != 50 {
				t.Errorf("while it was locked clients got %v", statuses)
			}
			if n := len(p.provider.got()) - hits; n > 10 || strings.Contains(name, "day") && n != 0 {
				t.Errorf("while it was locked the provider got %d calls", n)
			}
			release()
			waitFor(t, "the ledger", p.in.ledger.healthy)
			p.settle()
			if n := p.count(id); n != 2 {
				t.Errorf("the count is %d after 2 calls", n)
			}
			p.countsAgree()
			if strings.Contains(name, "day") {
				if l := p.limits("/manage/tokens/" + id)[0]; l.Used != 2 {
					t.Errorf("after 2 calls: %+v", l)
				}
				if n := p.spend(token, 3, 20); n != 8 {
					t.Errorf("of 8 calls that were left %d were answered", n)
				}
			}
		})
	}
}
