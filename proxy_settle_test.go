// Tests of settling: calls that cost money without tokens, made-up model names, and the traffic and checks that
// other tests use to compare the ledger's rows with its sums and counts.
package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestBilledWithoutTokens: a call that is billed without tokens counts as unpriced, never as free, and the bytes of
// a picture do not count as tokens.
func TestBilledWithoutTokens(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		path, model, answer, contentType string
		unpriced                         int64
	}{
		{"/v1/audio/speech", "gpt-4o-mini-tts", "binary", "audio/mpeg", 1},
		{"/v1/images/generations", "dall-e-3",
			`{"created":1,"data":[{"b64_json":"` + strings.Repeat("A", 100_000) + `"}]}`, "application/json", 1},
		{"/v1/moderations", "m", `{"id":"modr-1","results":[]}`, "application/json", 0},
		{"/v1/responses/input_tokens", "m", `{"object":"response.input_tokens","input_tokens":9}`,
			"application/json", 0},
	} {
		p := newTest(t, nil)
		p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool {
			return pc.reply(200, c.answer, "Content-Type: "+c.contentType)
		})
		body := strings.Replace(chatBody(), "gpt-4o-mini", c.model, 1)
		res := p.do("POST", c.path, body, "Authorization", "Bearer "+p.token, "Content-Type", "application/json")
		if res.status != 200 {
			t.Fatalf("%s: got %d %s", c.path, res.status, res.body)
		}
		if row := p.lastCall(); row.OutputTokens != 0 || row.Cost != nil && *row.Cost != 0 {
			t.Errorf("%s: the ledger has %+v", c.path, row)
		}
		var usage struct {
			Data []struct {
				Calls    int64
				Unpriced int64 `json:"unpriced_calls"`
			}
		}
		p.manage("GET", "/manage/usage?interval=total", "", 200, &usage)
		if len(usage.Data) != 1 || usage.Data[0].Calls != 1 || usage.Data[0].Unpriced != c.unpriced {
			t.Errorf("%s: the sums have %+v, want %d unpriced", c.path, usage.Data, c.unpriced)
		}
	}
}

// TestMadeUpModels: model names that a client makes up get a bounded number of sums, even if the provider accepts
// them all.
func TestMadeUpModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool { return pc.reply(200, `{"choices":[]}`) })
	const calls = maxTrackedModels + 30
	for i := range calls {
		body := fmt.Sprintf(`{"model":"made-up-%d","messages":[]}`, i)
		res := p.do("POST", "/v1/chat/completions", body,
			"Authorization", "Bearer "+p.token, "Content-Type", "application/json")
		if res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	p.waitSettled()
	var usage struct {
		Data []struct {
			Model string
			Calls int64
		}
	}
	p.manage("GET", "/manage/usage?interval=total&group_by=model", "", 200, &usage)
	for _, u := range usage.Data {
		if u.Model == "" && u.Calls != calls-maxTrackedModels {
			t.Errorf("%d calls are summed without a name, want %d", u.Calls, calls-maxTrackedModels)
		}
	}
	if len(usage.Data) != maxTrackedModels+1 {
		t.Errorf("%d names have sums, want %d", len(usage.Data), maxTrackedModels+1)
	}
}

// seededScript selects an answer by the number in the call's "seed".
func seededScript(c *providerConn, r recordedRequest) bool {
	var seed int
	if _, after, ok := strings.Cut(r.body, `"seed":`); ok {
		_, _ = fmt.Sscan(strings.TrimRight(after, "}"), &seed)
	}
	switch seed % 10 {
	case 0:
		return c.reply(500, `{"error":{"message":"x"}}`)
	case 1:
		return c.reply(429, `{"error":{"message":"x"}}`)
	case 2:
		return false
	case 3:
		c.beginSSE()
		_ = c.chunk(chatEvents(true)[1])
		return c.reset()
	case 4:
		return c.reply(200, strings.ReplaceAll(chatResponseBody,
			`"prompt_tokens":9`, `"prompt_tokens":`+fmt.Sprint(seed)))
	case 5:
		return c.reply(200, strings.ReplaceAll(chatResponseBody, "gpt-4o-mini", "unheard-of"))
	}
	return chatScript(c, r)
}

// trafficTokens creates a plain token, a limited one, and one whose calls are all refused.
func (p *testProxy) trafficTokens() (tokens []string) {
	for _, fields := range []string{
		`"name":"a"`, `"name":"b","max_requests":1000`, `"name":"c","policy":{"models":["gpt-5*"]}`} {
		_, token := p.newToken(fields)
		tokens = append(tokens, token)
	}
	return tokens
}

// randomTraffic makes calls with random tokens; some of its clients leave early. It returns once the server has ended
// all calls, with the status of each call that got one, by request id.
func (p *testProxy) randomTraffic(tokens []string, clients, calls int) map[string]int {
	var mu sync.Mutex
	seen := map[string]int{}
	var all sync.WaitGroup
	for n := range clients {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(n)))
			for range calls {
				ctx, cancel := context.WithCancel(context.Background())
				if rng.IntN(4) == 0 {
					time.AfterFunc(time.Duration(rng.IntN(3000))*time.Microsecond, cancel)
				}
				members := fmt.Sprintf(`"stream":%v,"seed":%d`, rng.IntN(2) == 0, rng.IntN(1000))
				id, status := p.sendChat(ctx, tokens[rng.IntN(len(tokens))], members)
				cancel()
				if status != 0 {
					mu.Lock()
					seen[id] = status
					mu.Unlock()
				}
			}
		})
	}
	all.Wait()
	p.waitDisconnected()
	return seen
}

// TestUnmeasuredCallsFillLimits: no form of an answer hides from a limit what a call uses. An answer that cannot be
// measured counts as what was reserved for it.
func TestUnmeasuredCallsFillLimits(t *testing.T) {
	t.Parallel()
	const form = "--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ngpt-4o-transcribe\r\n" +
		"--xyz\r\nContent-Disposition: form-data; name=\"response_format\"\r\n\r\ntext\r\n" +
		"--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\r\n--xyz--\r\n"
	image := `{"model":"gpt-image-1.5","prompt":"A cat"}`
	speech := `{"model":"gpt-4o-mini-tts","input":"` + strings.Repeat("word ", 2000) + `","voice":"alloy"}`
	const tokens, dollars = `{"count":"tokens","max":10000,"per":"day"}`, `{"count":"dollars","max":0.1,"per":"day"}`
	const multipart, transcriptions = "multipart/form-data; boundary=xyz", "/v1/audio/transcriptions"
	const chat, images = "/v1/chat/completions", "/v1/images/generations"
	const jsonType = "application/json"
	words := strings.Repeat("word ", 2000)
	for _, c := range []struct{ name, path, requestType, request, answerType, answer, limit string }{
		{"transcript, tokens", transcriptions, multipart, form, "text/plain", "Hello", tokens},
		{"transcript, dollars", transcriptions, multipart, form, "text/plain", "Hello", dollars},
		{"speech", "/v1/audio/speech", jsonType, speech, "audio/mpeg", "ID3..", tokens},
		{"picture", images, jsonType, image, "image/png", "PNG", dollars},
		{"picture without usage", images, jsonType, image, jsonType, `{"data":[{"b64_json":"AAAA"}]}`, tokens},
		{"chat as bytes", chat, jsonType, chatBody(), "application/octet-stream", words, tokens},
		{"chat, compressed", chat, jsonType, chatBody(), jsonType + "\r\nContent-Encoding: br", words, tokens},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newTest(t, nil)
			p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool {
				return pc.reply(200, c.answer, "Content-Type: "+c.answerType)
			})
			_, token := p.newToken(`"name":"limited","policy":{"limits":[` + c.limit + `]}`)
			for range 12 {
				res := p.do("POST", c.path, c.request, "Authorization", "Bearer "+token, "Content-Type", c.requestType)
				if res.status == 429 {
					if row := p.ledger()[0]; row.UsageSource != "estimated" {
						t.Errorf("the row has %+v", row)
					}
					return
				}
				if res.status != 200 {
					t.Fatalf("got %d %s", res.status, res.body)
				}
				p.waitSettled()
			}
			t.Errorf("12 calls did not fill the limit %s", c.limit)
		})
	}
}

// TestLeftStreamIsCharged: a client that leaves before the usage event is charged the text that it got, although all
// events have one size.
func TestLeftStreamIsCharged(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	event := `data: {"choices":[{"index":0,"delta":{"content":"` + strings.Repeat("word ", 40) + `"}}]}` + "\n\n"
	p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool {
		pc.beginSSE()
		for range 200 {
			_ = pc.chunk(event)
		}
		pc.waitClosed(hangTimeout)
		return false
	})
	s := p.stream(p.token)
	if _, err := s.read(200 * len(event)); err != nil {
		t.Fatal(err)
	}
	s.body.Close()
	if row := p.lastCall(); row.UsageSource != "estimated" || row.OutputTokens != 200*50 {
		t.Errorf("the row has %+v", row)
	}
}

// TestBudgetKeepsItsPrice: an answer that names a model without a price is charged at the price by which the call was
// admitted, so its budget fills.
func TestBudgetKeepsItsPrice(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.setScript(func(pc *providerConn, _ recordedRequest) bool {
		return pc.reply(200, `{"model":"snapshot-of-tomorrow","choices":[],`+
			`"usage":{"prompt_tokens":9,"completion_tokens":100000}}`)
	})
	_, token := p.newToken(`"name":"limited","policy":{"limits":[{"count":"dollars","max":0.1,"per":"day"}]}`)
	if res := p.chatAs(token); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	if row := p.lastCall(); row.Model != "snapshot-of-tomorrow" || row.Cost == nil || *row.Cost < 0.05 {
		t.Errorf("the row has %+v", row)
	}
	if res := p.chatAs(token); res.status != 200 {
		t.Fatalf("got %d %s", res.status, res.body)
	}
	p.waitSettled()
	if res := p.chatAs(token); res.status != 429 {
		t.Errorf("a budget that is used up allowed a call: %d %s", res.status, res.body)
	}
}
