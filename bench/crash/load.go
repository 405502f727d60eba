// This file makes the load: a scripted provider, and clients that record what they see.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A provider answers chat calls. The "seed" of a call decides how, so that the client knows what to expect.
type provider struct {
	url     string
	server  *http.Server
	limited atomic.Int64 // calls of the limited token, which are marked in "user"
}

func startProvider() (*provider, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &provider{url: "http://" + l.Addr().String()}
	p.server = &http.Server{Handler: http.HandlerFunc(p.answer), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = p.server.Serve(l) }() // ends with close
	return p, nil
}

func (p *provider) close() { _ = p.server.Close() }

// usageOf returns the usage that the provider reports for a call.
func usageOf(seed int) (input, output int) { return seed%1000 + 1, seed%77 + 1 }

const failEvery = 20 // one in this many seeds is answered with 500

func (p *provider) answer(w http.ResponseWriter, r *http.Request) {
	var call struct {
		Stream bool
		User   string
		Seed   int
	}
	if err := json.NewDecoder(r.Body).Decode(&call); err != nil {
		http.Error(w, "{}", http.StatusBadRequest)
		return
	}
	if call.User == "limited" {
		p.limited.Add(1)
	}
	time.Sleep(time.Duration(call.Seed%7) * time.Millisecond)
	input, output := usageOf(call.Seed)
	usage := fmt.Sprintf(`"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}`, input, output, input+output)
	w.Header().Set("Content-Type", "application/json")
	if call.Seed%failEvery == 0 {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, `{"error":{"message":"failed"}}`)
		return
	}
	if !call.Stream {
		_, _ = io.WriteString(w, `{"id":"c","model":"gpt-4o-mini","choices":[{"message":{"role":"assistant","content":"Hi"}}],`+usage+`}`)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	send := func(data string) {
		_, _ = io.WriteString(w, "data: "+data+"\n\n")
		_ = http.NewResponseController(w).Flush()
	}
	for range 1 + call.Seed%20 {
		send(`{"id":"c","model":"gpt-4o-mini","choices":[{"index":0,"delta":{"content":"Hi"}}]}`)
		time.Sleep(time.Duration(call.Seed%5) * time.Millisecond)
	}
	send(`{"id":"c","model":"gpt-4o-mini","choices":[],` + usage + `}`)
	send("[DONE]")
}

// A sight is what a client saw of a call.
type sight struct {
	id       string // the request id; "" if no byte of an answer arrived
	token    *token
	seed     int
	status   int
	complete bool      // the answer arrived completely
	at       time.Time // when it ended
}

// load runs the clients until the program is killed after d, and returns what they saw.
func (t *trial) load(ctx context.Context, d time.Duration) []sight {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var mu sync.Mutex
	var all []sight
	var clients sync.WaitGroup
	for n := range t.clients {
		rng := rand.New(rand.NewPCG(t.seed, uint64(t.kills*1000+n)))
		clients.Go(func() {
			for ctx.Err() == nil {
				s := t.call(ctx, rng)
				mu.Lock()
				all = append(all, s)
				mu.Unlock()
				if s.status == http.StatusTooManyRequests {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	t.proxy.kill()
	t.kills++
	stop()
	clients.Wait()
	return all
}

// call makes one call and reads its answer, or disconnects while reading.
func (t *trial) call(ctx context.Context, rng *rand.Rand) (s sight) {
	s = sight{token: t.tokens[rng.IntN(len(t.tokens))], seed: rng.IntN(1_000_000)}
	user := "anyone"
	if s.token.limit > 0 {
		user = "limited"
	}
	stream := rng.IntN(2) == 0
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	if rng.IntN(20) == 0 {
		time.AfterFunc(time.Duration(rng.IntN(20))*time.Millisecond, leave)
	}
	body := fmt.Sprintf(`{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}],"user":%q,"seed":%d,"stream":%v}`, user, s.seed, stream)
	defer func() { s.at = time.Now() }()
	req, err := http.NewRequestWithContext(ctx, "POST", t.proxy.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return s
	}
	req.Header.Set("Authorization", "Bearer "+s.token.value)
	req.Header.Set("Content-Type", "application/json")
	res, err := t.proxy.client.Do(req)
	if err != nil {
		return s
	}
	defer res.Body.Close()
	s.id, s.status = res.Header.Get("X-Llm-Proxy-Request-Id"), res.StatusCode
	b, err := io.ReadAll(res.Body)
	s.complete = err == nil && (!stream || s.status != http.StatusOK || strings.HasSuffix(string(b), "data: [DONE]\n\n"))
	return s
}
