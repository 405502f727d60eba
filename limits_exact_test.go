// Tests of limits under a barrier (LI1, LI2, LI3, LI10): of M calls at once
// exactly N get through, for every kind of limit, of a token and of a project,
// new or in use, whatever way the calls come.
package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// calm waits until the next full hour, where every calendar window may begin
// anew, is at least d away.
func calm(d time.Duration) {
	if left := time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)); left < d {
		time.Sleep(left + 10*time.Millisecond)
	}
}

// newProject makes a project with a policy, and n tokens of it with another.
func (p *testProxy) newProject(name, policy, tokenPolicy string, n int) (id string, tokens, ids []string) {
	p.t.Helper()
	var v struct{ ID string }
	p.manage("POST", "/manage/projects", fmt.Sprintf(`{"name":%q,"openai_api_key":%q,"policy":%s}`, name, p.provider.key, policy), 201, &v)
	for range n {
		var tok struct{ ID, Token string }
		p.manage("POST", "/manage/tokens", fmt.Sprintf(`{"project_id":%q,"name":"t","policy":%s}`, v.ID, tokenPolicy), 201, &tok)
		p.mu.Lock()
		p.secrets = append(p.secrets, tok.Token)
		p.mu.Unlock()
		tokens, ids = append(tokens, tok.Token), append(ids, tok.ID)
	}
	return v.ID, tokens, ids
}

// limits returns how the limits of a token or project stand, when no call runs.
func (p *testProxy) limits(path string) []limitNow {
	p.t.Helper()
	p.settle()
	return p.limitsNow(path)
}

// A limitNow is a limit as GET shows it.
type limitNow struct {
	Count, Per, Endpoint, Model string
	Max, Used, Reserved, Left   float64
	Shadow                      bool
	ResetsAt                    *time.Time `json:"resets_at"`
	WouldRefuse                 int        `json:"would_refuse"`
}

func (p *testProxy) limitsNow(path string) []limitNow {
	p.t.Helper()
	var v struct{ Limits []limitNow }
	p.manage("GET", path, "", 200, &v)
	return v.Limits
}

// send makes a call from any goroutine, over rt or, with nil, a connection of
// its own. Status 0 is a call without an answer.
func (p *testProxy) send(rt http.RoundTripper, token, path, body string, headers ...string) (int, http.Header) {
	req, err := http.NewRequestWithContext(context.Background(), "POST", p.url+path, strings.NewReader(body))
	if err != nil {
		p.t.Error(err)
		return 0, nil
	}
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	if rt == nil {
		rt = &http.Transport{DisableKeepAlives: true}
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		return 0, nil
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return 0, res.Header
	}
	return res.StatusCode, res.Header
}

// crowd makes m calls at the same moment. The provider answers none before each
// has come to it or was refused, so that all that are let in run together. It
// returns how many reached the provider, and how often each status came.
func (p *testProxy) crowd(m int, call func(i int) (status int)) (hits int, statuses map[int]int) {
	p.t.Helper()
	var in, out atomic.Int64
	open := make(chan struct{})
	p.provider.answer(func(c *providerConn, r recorded) bool {
		in.Add(1)
		<-open
		return answerChat(c, r)
	})
	var mu sync.Mutex
	statuses = map[int]int{}
	var all, ready sync.WaitGroup
	barrier := make(chan struct{})
	ready.Add(m)
	for i := range m {
		all.Go(func() {
			ready.Done()
			<-barrier
			status := call(i)
			out.Add(1)
			mu.Lock()
			defer mu.Unlock()
			statuses[status]++
		})
	}
	ready.Wait()
	close(barrier)
	for deadline := time.Now().Add(20 * time.Second); in.Load()+out.Load() < int64(m); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Errorf("of %d calls %d are with the provider and %d are over", m, in.Load(), out.Load())
			break
		}
	}
	hits = int(in.Load())
	close(open)
	all.Wait()
	p.provider.answer(answerChat)
	return hits, statuses
}

// A limitKind is a limit that lets exactly 5 calls through: new, or with 3 made
// before. Its max is in JSON.
type limitKind struct {
	count, per string
	fresh      string // max for 5 calls
	warm       string // max for 3 that were answered, and 5
	rate       float64
}

// limitKinds is every kind of limit. A call may need 26 tokens for its body and
// 100 for its answer; answered it has used 9 and 3. In nano-dollars a token of
// gpt-4o-mini costs 150 and 600.
func limitKinds() (out []limitKind) {
	const need, used, needUSD, usedUSD = 126, 12, 26*150 + 100*600, 9*150 + 3*600
	for per := perSecond; per <= perLifetime; per++ {
		k := limitKind{count: "requests", per: per.String(), fresh: "5", warm: "8"}
		if b := per.bucket(); b > 0 {
			k.warm, k.rate = k.fresh, 5/float64(b) // what flows back is seen to below
		}
		out = append(out, k)
		k = limitKind{count: "tokens", per: per.String(), fresh: fmt.Sprint(5*need + need/2), warm: fmt.Sprint(3*used + 5*need + need/2)}
		if b := per.bucket(); b > 0 {
			k.warm, k.rate = k.fresh, 5.5/float64(b)
		}
		out = append(out, k)
		if per >= perHour {
			out = append(out, limitKind{count: "dollars", per: per.String(), fresh: fmt.Sprintf("0.%09d", 5*needUSD+needUSD/2), warm: fmt.Sprintf("0.%09d", 3*usedUSD+5*needUSD+needUSD/2)})
		}
	}
	return append(out, limitKind{count: "concurrent", fresh: "5", warm: "5"})
}

const fiveBody = `"max_tokens":100`

// TestExactlyN: see the file's head.
func TestExactlyN(t *testing.T) {
	t.Parallel()
	if n := len(chatBody(fiveBody)); (n+3)/4 != 26 {
		t.Fatalf("the body has %d bytes: limitKinds is made for another number", n)
	}
	for _, where := range []string{"token", "project"} {
		for _, warm := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, warm %v", where, warm), func(t *testing.T) {
				t.Parallel()
				p := newTest(t, map[string]string{"LOG_LEVEL": "error"})
				for i, k := range limitKinds() {
					p.exactly5(k, where, warm, i%3)
				}
				p.sumsAgree()
				p.countsAgree()
			})
		}
	}
}

// exactly5 tries one kind of limit. pattern 1 and 2 hold it to an endpoint or a
// model, beside limits that the calls have nothing to do with.
func (p *testProxy) exactly5(k limitKind, where string, warm bool, pattern int) {
	p.t.Helper()
	const made, m = 3, 40
	name := fmt.Sprintf("%s per %s of a %s, warm %v, pattern %d", k.count, k.per, where, warm, pattern)
	most := k.fresh
	if warm {
		most = k.warm
	}
	limit := fmt.Sprintf(`{"count":%q,"max":%s`, k.count, most)
	if k.per != "" {
		limit += fmt.Sprintf(`,"per":%q`, k.per)
	}
	others := ``
	switch pattern {
	case 1:
		limit += `,"endpoint":"/v1/chat/*"`
		others = `,{"count":"requests","max":0,"per":"day","endpoint":"POST /v1/embeddings"}`
	case 2:
		limit += `,"model":"gpt-4o*"`
		others = `,{"count":"concurrent","max":0,"model":"gpt-5*"}`
	}
	policy, path := `{"limits":[`+limit+`}`+others+`]}`, ""
	calm(5 * time.Second)
	var tokens []string
	if where == "token" {
		_, all, ids := p.newProject(name, `{}`, policy, 1)
		tokens, path = all, "/manage/tokens/"+ids[0]
	} else {
		id, all, _ := p.newProject(name, policy, `{}`, 3)
		tokens, path = all, "/manage/projects/"+id
	}
	before := time.Now()
	if warm {
		for i := range made {
			if res := p.chatAs(tokens[i%len(tokens)], fiveBody); res.status != 200 {
				p.t.Fatalf("%s: got %d %s", name, res.status, res.body)
			}
		}
		p.settle()
	}
	want := 5
	if k.rate > 0 && warm {
		want -= made // at most: what has been taken flows back
		if k.count == "tokens" {
			want = 5
		}
	}
	hits, statuses := p.crowd(m, func(i int) int {
		status, _ := p.send(nil, tokens[i%len(tokens)], "/v1/chat/completions", chatBody(fiveBody))
		return status
	})
	flowed := int(k.rate*float64(time.Since(before).Milliseconds()+1) + 0.5) // limits of tokens have half a call too much
	if hits < want || hits > want+flowed || k.rate == 0 && hits != want || statuses[200] != hits || statuses[429] != m-hits {
		p.t.Errorf("%s: of %d calls %d reached the provider, want %d (and %d for what flowed back); clients got %v", name, m, hits, want, flowed, statuses)
	}
	l := p.limits(path)[0]
	if l.Reserved != 0 || k.count == "concurrent" && l.Used != 0 {
		p.t.Errorf("%s: when no call runs, it says %+v", name, l)
	}
	if k.rate > 0 || k.count == "concurrent" {
		return
	}
	done := float64(hits)
	if warm {
		done += made
	}
	if unit := map[string]float64{"requests": 1, "tokens": 12, "dollars": 3_150e-9}[k.count]; fmt.Sprintf("%.9f", l.Used) != fmt.Sprintf("%.9f", done*unit) {
		p.t.Errorf("%s: after %v calls it says %+v", name, done, l)
	}
}

// TestOneCounter (LI10): HTTP/1.1, HTTP/2 and clients at many addresses behind a
// trusted proxy share the token's and the project's one count.
func TestOneCounter(t *testing.T) {
	t.Parallel()
	cert, key := testCertificate(t, t.TempDir(), time.Hour)
	p := newTest(t, map[string]string{"LOG_LEVEL": "error", "TRUSTED_PROXIES": "127.0.0.1", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key})
	h2 := p.http2(cert)
	defer h2.CloseIdleConnections()
	for i, limit := range []string{`{"count":"requests","max":5,"per":"day"}`, `{"count":"concurrent","max":5}`, `{"count":"tokens","max":693,"per":"lifetime"}`} {
		for _, where := range []string{"token", "project"} {
			calm(5 * time.Second)
			own, its := `{"limits":[`+limit+`]}`, `{}`
			if where == "project" {
				own, its = its, own
			}
			_, tokens, _ := p.newProject(fmt.Sprint(where, i), its, own, 1)
			hits, statuses := p.crowd(60, func(i int) int {
				var rt http.RoundTripper = h2
				if i%2 == 0 {
					h1 := p.http2(cert)
					h1.ForceAttemptHTTP2, h1.DisableKeepAlives = false, true
					rt = h1
				}
				status, _ := p.send(rt, tokens[0], "/v1/chat/completions", chatBody(fiveBody), "X-Forwarded-For", fmt.Sprintf("198.51.100.%d, 203.0.113.%d", i, i%10))
				return status
			})
			if hits != 5 || statuses[200] != 5 || statuses[429] != 55 {
				t.Errorf("%s of a %s: %d calls reached the provider, clients got %v", limit, where, hits, statuses)
			}
		}
	}
	addresses := map[string]bool{}
	for _, v := range p.rows() {
		addresses[v.address] = true
	}
	if len(addresses) < 5 {
		t.Errorf("the calls came from %v: the test is not one of many addresses", addresses)
	}
}
