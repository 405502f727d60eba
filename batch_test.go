// Tests of the results of batches: what their answers have used counts once, when they are read, for the token that
// made the batch.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// openAIResults are the results of a batch at OpenAI: chat, a response, embeddings, and what costs nothing.
// At batch prices gpt-4o-mini costs 0.075/0.3, gpt-5 0.625/0.0625/5, text-embedding-3-small 0.01 a million tokens.
var openAIResults = strings.Join([]string{
	`{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"request_id":"r1","body":{"id":"chatcmpl-1",` +
		`"object":"chat.completion","model":"gpt-4o-mini-2024-07-18","choices":[{"message":{"content":"{\"usage\":9}"` +
		`}}],"usage":{"prompt_tokens":1000,"completion_tokens":200,"total_tokens":1200},"service_tier":"default"}},` +
		`"error":null}`,
	`{"custom_id":"b","response":{"status_code":200,"body":{"object":"response","model":"gpt-5","status":"completed",` +
		`"output":[{"type":"message","content":[{"type":"output_text","text":"Hi"}]}],"usage":{"input_tokens":800,` +
		`"input_tokens_details":{"cached_tokens":300},"output_tokens":100,` +
		`"output_tokens_details":{"reasoning_tokens":60},"total_tokens":900}}}}`,
	`{"custom_id":"c","response":{"status_code":200,"body":{"object":"list","data":[{"embedding":[0.1,-0.2]}],` +
		`"model":"text-embedding-3-small","usage":{"prompt_tokens":500,"total_tokens":500}}}}`,
	`{"custom_id":"d","response":{"status_code":400,"body":{"error":{"message":"no","type":"invalid_request_error"}}}}`,
	``,
	`{"custom_id":"e","response":null,"error":{"code":"batch_expired","message":"too late"}}`,
	`{"custom_id":"f","response":{"status_code":200,"body":{"id":"modr-1","results":[{"flagged":false}]}}}`,
	`{"custom_id":"g","response":{"status_code":200,"body":{"model":"gpt-4o-mini-2024-07-18","choices":[],` +
		`"usage":{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}}}`,
}, "\n")

// 1010 x 0.075 + 202 x 0.3 = 136.35; 500 x 0.625 + 300 x 0.0625 + 100 x 5 = 831.25; 500 x 0.01 = 5 micro-dollars.
const openAICost, openAIInput, openAIOutput = 0.0009726, 2310, 302

// anthropicResults are the results of a batch at Anthropic. claude-haiku-4-5 costs 0.5/0.05/0.625/2.5 in a batch.
const anthropicResults = `{"custom_id":"a","result":{"type":"succeeded","message":{"id":"msg_1","type":"message",` +
	`"model":"claude-haiku-4-5","content":[{"type":"text","text":"Hi"}],"usage":{"input_tokens":100,` +
	`"cache_creation_input_tokens":40,"cache_read_input_tokens":60,"output_tokens":20,"service_tier":"batch"}}}}
{"custom_id":"b","result":{"type":"errored","error":{"type":"error","error":{"type":"invalid_request","message":"no"}}}}
{"custom_id":"c","result":{"type":"expired"}}
`

// 100 x 0.5 + 40 x 0.625 + 60 x 0.05 + 20 x 2.5 = 128 micro-dollars.
const anthropicCost, anthropicInput, anthropicOutput = 0.000128, 200, 20

// A batchProvider is a provider with batches.
type batchProvider struct {
	mu      sync.Mutex
	results string
	cut     int // the answer breaks off after so many bytes; 0: it does not
}

func (b *batchProvider) script(c *providerConn, r recordedRequest) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	path, _, _ := strings.Cut(r.target, "?")
	switch {
	case strings.HasSuffix(path, "/content") || strings.HasSuffix(path, "/results"):
		text, status, head := b.results, 200, ""
		if from, ok := strings.CutPrefix(r.header.Get("Range"), "bytes="); ok {
			var start, end int
			_, _ = fmt.Sscanf(from, "%d-%d", &start, &end)
			text, status = text[start:min(end+1, len(text))], 206
			head = fmt.Sprintf("Content-Range: bytes %d-%d/%d\r\n", start, end, len(b.results))
		}
		length := len(text)
		if b.cut > 0 {
			text = text[:min(b.cut, len(text))]
		}
		_, _ = fmt.Fprintf(c, "HTTP/1.1 %d X\r\nContent-Type: application/octet-stream\r\n%sContent-Length: %d\r\n\r\n",
			status, head, length)
		for len(text) > 0 { // in pieces that end anywhere
			n := min(len(text), 77)
			_, _ = io.WriteString(c, text[:n])
			text = text[n:]
		}
		return b.cut == 0
	case path == "/v1/batches" && r.method == "GET":
		return c.reply(200, `{"object":"list","data":[`+batchJSON("completed")+`]}`)
	case strings.HasPrefix(path, "/v1/messages/batches"):
		return c.reply(200, `{"id":"msgbatch_1","type":"message_batch","processing_status":"ended"}`)
	case r.method == "POST":
		return c.reply(200, batchJSON("validating"))
	}
	return c.reply(200, batchJSON("completed"))
}

func batchJSON(status string) string {
	files := `null`
	if status == "completed" {
		files = `"file-out"`
	}
	return `{"id":"batch_1","object":"batch","endpoint":"/v1/chat/completions","input_file_id":"file-in","status":"` +
		status + `","output_file_id":` + files + `,"error_file_id":null}`
}

func newBatchTest(t *testing.T, provider, results string) (*testProxy, *batchProvider) {
	t.Helper()
	p, b := newTest(t, map[string]string{"LOG_LEVEL": "error"}), &batchProvider{results: results}
	p.changeProject(`"policy":{"stateful":true}`)
	if provider == "anthropic" {
		p.manage("POST", "/manage/projects/"+p.project+"/upstreams", `{"name":"claude","provider":"anthropic",`+
			`"base_url":"`+p.provider.url+`","api_key":"`+p.provider.key+`"}`, 201, nil)
	}
	p.provider.setScript(b.script)
	return p, b
}

func (b *batchProvider) set(results string, cut int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.results, b.cut = results, cut
}

// batchCall makes a call as a token of a batch's client.
func (p *testProxy) batchCall(token, method, path, body string, headers ...string) testResponse {
	p.t.Helper()
	return p.do(method, path, body, append(headers, "Authorization", "Bearer "+token, "Content-Type",
		"application/json")...)
}

const newBatchBody = `{"input_file_id":"file-in","endpoint":"/v1/chat/completions","completion_window":"24h"}`

// checkBatch checks what was counted in all, that it is a token's, and that sums equal rows.
func (p *testProxy) checkBatch(token string, input, output int64, cost float64) {
	p.t.Helper()
	p.waitSettled()
	for _, u := range p.usage("interval=total&group_by=token") {
		want := u.TokenID != nil && *u.TokenID == token
		c, _ := u.Cost.Float64()
		if want && (u.Input != input || u.Output != output || fmt.Sprintf("%.9f", c) != fmt.Sprintf("%.9f", cost)) ||
			!want && (u.Input != 0 || c != 0) {
			p.t.Errorf("token %s: %+v, want %d/%d and %.9f for %s", *u.TokenID, u, input, output, cost, token)
		}
	}
	p.checkSums()
	p.checkCounts()
}

// TestBatchResults: whatever is read, in which pieces and how often, each answer of a batch counts once.
func TestBatchResults(t *testing.T) {
	t.Parallel()
	const openAI, anthropic = "/v1/files/file-out/content", "/v1/messages/batches/msgbatch_1/results"
	for _, tt := range []struct {
		name, provider, path string
		show                 string // a call that shows the batch before the results are read
	}{
		{"OpenAI", "openai", openAI, "/v1/batches/batch_1"},
		{"OpenAI by the list", "openai", openAI, "/v1/batches?limit=2"},
		{"Anthropic", "anthropic", anthropic, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			results, input, output, cost := openAIResults, int64(openAIInput), int64(openAIOutput), openAICost
			create, body := "/v1/batches", newBatchBody
			if tt.provider == "anthropic" {
				results, input, output, cost = anthropicResults, anthropicInput, anthropicOutput, anthropicCost
				create = "/v1/messages/batches"
				body = `{"requests":[{"custom_id":"a","params":{"model":"claude-haiku-4-5","max_tokens":9}}]}`
			}
			p, b := newBatchTest(t, tt.provider, results)
			const limit = `"policy":{"limits":[{"count":"tokens","max":99999,"per":"day"}]}`
			maker, token := p.newToken(`"name":"maker",` + limit)
			if res := p.batchCall(token, "POST", create, body); res.status != 200 {
				t.Fatalf("got %d %s", res.status, res.body)
			}
			if tt.show != "" {
				p.batchCall(p.token, "GET", tt.show, "")
			}
			b.set(results, len(results)/2)
			p.batchCall(p.token, "GET", tt.path, "")
			b.set(results, 0)
			var readers sync.WaitGroup
			for i := range 6 {
				readers.Go(func() {
					res := p.batchCall([]string{p.token, token}[i%2], "GET", tt.path, "")
					if res.status != 200 || res.body != results {
						t.Errorf("got %d %q", res.status, res.body)
					}
				})
			}
			readers.Wait()
			p.checkBatch(maker, input, output, cost)
			if res := p.batchCall(token, "GET", tt.path, "", "Range", "bytes=9-20"); res.body != results {
				t.Errorf("a part of known results was read: %q", res.body)
			}
			if err := p.stop(); err != nil {
				t.Fatal(err)
			}
			p.start()
			p.batchCall(p.token, "GET", tt.path, "")
			p.checkBatch(maker, input, output, cost)
			var l struct{ Limits []struct{ Used float64 } }
			if p.manage("GET", "/manage/tokens/"+maker, "", 200, &l); l.Limits[0].Used != float64(input+output) {
				t.Errorf("the maker's limit has used %v", l.Limits)
			}
			for _, row := range p.ledger() {
				if made := strings.HasPrefix(row.Endpoint, "POST"); made != (row.InputTokens > 0) {
					t.Errorf("%+v", row)
				}
			}
			for _, u := range p.usage("interval=total&group_by=service_tier") {
				if u.Input > 0 && u.Calls > 0 || u.Input != input && u.Input != 0 {
					t.Errorf("by tier: %+v", u)
				}
			}
		})
	}
}

// TestBatchResultsWhileBusy: the usage of results counts, in the sums and in limits, however long the database takes to
// record it.
func TestBatchResultsWhileBusy(t *testing.T) {
	t.Parallel()
	requireSQLite(t, "it locks the file of the database")
	p, b := newBatchTest(t, "openai", openAIResults)
	p.setPragma(`PRAGMA busy_timeout = 20000`)
	maker, token := p.newToken(`"name":"maker","policy":{"limits":[{"count":"tokens","max":99999,"per":"day"}]}`)
	p.batchCall(token, "POST", "/v1/batches", newBatchBody)
	p.waitSettled()
	p.batchCall(token, "GET", "/v1/batches/batch_1", "")
	p.waitSettled()
	asked, locked := make(chan struct{}), make(chan struct{})
	p.provider.setScript(func(c *providerConn, r recordedRequest) bool {
		close(asked)
		<-locked
		return b.script(c, r)
	})
	var reader sync.WaitGroup
	reader.Go(func() {
		if res := p.batchCall(p.token, "GET", "/v1/files/file-out/content", ""); res.body != openAIResults {
			t.Errorf("got %d %q", res.status, res.body)
		}
	})
	<-asked
	if err := p.instance.ledger.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	unlock, queued := p.lockDatabase(), p.instance.ledger.queuedSoFar()
	close(locked)
	waitFor(t, "the end of the call", func() bool { return p.instance.ledger.queuedSoFar() > queued })
	ended := time.Now()
	waitFor(t, "a slow database", func() bool { return time.Since(ended) > limitLoadTimeout*5/4 })
	unlock()
	reader.Wait()
	p.checkBatch(maker, openAIInput, openAIOutput, openAICost)
	var l struct{ Limits []struct{ Used float64 } }
	if p.manage("GET", "/manage/tokens/"+maker, "", 200, &l); l.Limits[0].Used != openAIInput+openAIOutput {
		t.Errorf("the maker's limit has used %v", l.Limits)
	}
}

// TestBatchResultsOfUnknown: results of a batch that no known token has made belong to the token that reads them.
func TestBatchResultsOfUnknown(t *testing.T) {
	t.Parallel()
	p, b := newBatchTest(t, "openai", openAIResults)
	id, reader := p.newToken(`"name":"reader"`)
	first := strings.IndexByte(openAIResults, '\n') + 1
	for _, part := range []string{ // a client that continues where it was cut
		fmt.Sprintf("bytes=%d-%d", first, len(openAIResults)-1), "bytes=0-200", ""} {
		res := p.batchCall(reader, "GET", "/v1/files/file-out/content", "", "Range", part)
		if res.status/100 != 2 {
			t.Errorf("got %d %s", res.status, res.body)
		}
	}
	p.checkBatch(id, openAIInput, openAIOutput, openAICost)
	p.batchCall(p.token, "GET", "/v1/files/file-out/content", "")
	p.checkBatch(id, openAIInput, openAIOutput, openAICost)
	if row := p.lastCall(); row.InputTokens != 0 || row.UsageSource != "none" {
		t.Errorf("the second reader's row: %+v", row)
	}
	b.set(openAIResults+"\n"+strings.Split(openAIResults, "\n")[0], 0) // a server that appends to its file
	p.batchCall(reader, "GET", "/v1/files/file-out/content", "")
	p.checkBatch(id, openAIInput+1000, openAIOutput+200, openAICost+0.000135)
}

// TestFilesAreNoResults: files of any other kind cost nothing, whatever they contain.
func TestFilesAreNoResults(t *testing.T) {
	t.Parallel()
	p, b := newBatchTest(t, "openai", "")
	chat := `{"model":"gpt-4o-mini","usage":{"prompt_tokens":1000,"completion_tokens":200},"choices":[]}`
	for _, file := range []string{
		"", "\n\n", chat, chat + "\n" + chat, "[" + chat + "]", "not JSON\n{", `{"custom_id":"a"}`,
		`{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":` + chat + `}`,
		`{"messages":[{"role":"user","content":"usage"}]}`, `{"response":{"body":` + chat + `}}`,
		`{"custom_id":7,"response":{"body":` + chat + `}}`,
		`{"custom_id":"a","response":` + strings.Repeat(`{"body":`, 99) + chat + strings.Repeat("}", 99) + `}`,
		strings.Repeat("[", 10_000) + strings.Repeat(`{"custom_id":"a","response":{"body":`, 20),
	} {
		b.set(file, 0)
		if res := p.batchCall(p.token, "GET", "/v1/files/file-1/content", ""); res.status != 200 || res.body != file {
			t.Errorf("%.60q: got %d %q", file, res.status, res.body)
		}
		if row := p.lastCall(); row.InputTokens != 0 || row.Cost != nil || row.UsageSource != "none" {
			t.Errorf("%.60q: %+v", file, row)
		}
	}
}

// TestBatchResultsEstimated: answers without usage are estimated, and those of a model without a price have none.
func TestBatchResultsEstimated(t *testing.T) {
	t.Parallel()
	line := func(model, usage string) string {
		return `{"custom_id":"a","response":{"status_code":200,"body":{"model":"` + model +
			`","choices":[{"message":{"content":"` + strings.Repeat("word ", 80) + `"}}]` + usage + `}}}` + "\n"
	}
	const usage = `,"usage":{"prompt_tokens":10,"completion_tokens":20}`
	p, b := newBatchTest(t, "openai", "")
	for i, tt := range []struct {
		results, source string
		cost            bool
	}{
		{line("gpt-5", usage), "exact", true},
		{strings.TrimSuffix(line("gpt-5", usage), "}}}\n"), "exact", true}, // cut after the usage
		{line("gpt-5", ""), "estimated", true},
		{line("gpt-5", `,"usage":{"prompt_tokens":0,"completion_tokens":0}`), "estimated", true},
		{line("gpt-5", usage) + line("gpt-5", ""), "estimated", true},
		{line("nobody-knows", usage), "exact", false},
		{line("gpt-5", usage) + line("nobody-knows", usage), "exact", false},
	} {
		b.set(tt.results, 0)
		p.batchCall(p.token, "GET", fmt.Sprintf("/v1/files/file-%d/content", i), "")
		row := p.lastCall()
		if row.UsageSource != tt.source || row.OutputTokens < 20 || (row.Cost != nil) != tt.cost || row.Model == "" {
			t.Errorf("%d: %+v", i, row)
		}
	}
	for _, u := range p.usage("interval=total&group_by=model") {
		if *u.Model == "gpt-5" && (u.UnpricedCalls != 0 || u.EstimatedCalls != 3) ||
			*u.Model == "nobody-knows" && u.UnpricedCalls != 2 {
			t.Errorf("%+v", u)
		}
	}
}

// TestBatchResultsInPassing: results pass byte by byte as they come, with little memory, whatever the size of a line.
func TestBatchResultsInPassing(t *testing.T) {
	t.Parallel()
	p, _ := newBatchTest(t, "openai", "")
	const size = 40 << 20
	first, rest := make(chan struct{}), make(chan struct{})
	p.provider.setScript(func(c *providerConn, _ recordedRequest) bool {
		head := `{"custom_id":"a","response":{"body":{"model":"gpt-4o-mini","choices":[{"message":{"content":"`
		tail := `"}}],"usage":{"prompt_tokens":1000,"completion_tokens":200}}}}` + "\n"
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n%s", len(head)+size+len(tail), head)
		close(first)
		<-rest
		text := strings.Repeat("x", 1<<20)
		for range size >> 20 {
			_, _ = io.WriteString(c, text)
		}
		_, err := io.WriteString(c, tail)
		return err == nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", p.url+"/v1/files/file-1/content", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+p.token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	<-first
	body := bufio.NewReader(res.Body)
	if text, err := body.Peek(14); err != nil || string(text) != `{"custom_id":"` {
		t.Fatalf("before the provider went on: %q, %v", text, err)
	}
	close(rest)
	if n, err := io.Copy(io.Discard, body); err != nil || n < size {
		t.Errorf("%d bytes, %v", n, err)
	}
	if row := p.lastCall(); row.InputTokens != 1000 || row.OutputTokens != 200 || row.Model != "gpt-4o-mini" {
		t.Errorf("%+v", row)
	}
}

// TestBatchMeterEveryCut: what results have used does not depend on how they come in pieces, and no bytes do harm.
func TestBatchMeterEveryCut(t *testing.T) {
	t.Parallel()
	table := listPrices(t)
	read := func(vendor string, kind meterKind, pieces ...string) (sum requestRow) {
		m := newBatchMeter(kind, usageDetails{}, func(r *requestRow) { table.priceRow(r, vendor, r.model) })
		for _, piece := range pieces {
			m.process([]byte(piece))
		}
		m.finish()
		for i := range m.models {
			if m.models[i].addUsage(&requestRow{}); m.models[i].priced {
				sum.addUsage(&m.models[i].requestRow)
			}
		}
		return sum
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, tt := range []struct {
		vendor, results string
		kind            meterKind
		nanos           int64
	}{{"openai", openAIResults, meterOpenAI, openAICost * 1e9},
		{"anthropic", anthropicResults, meterAnthropic, anthropicCost * 1e9}} {
		for i := range len(tt.results) {
			first, rest := tt.results[:i], tt.results[i:]
			if got := read(tt.vendor, tt.kind, first, rest); got.cost != tt.nanos {
				t.Fatalf("%s cut at %d: %d nano-dollars, want %d", tt.vendor, i, got.cost, tt.nanos)
			}
			if got := read(tt.vendor, tt.kind, first); got.cost > tt.nanos { // a download that broke off
				t.Fatalf("%s broken off at %d: %d nano-dollars", tt.vendor, i, got.cost)
			}
			broken := []byte(tt.results)
			for range 1 + i%3 {
				broken[rnd.IntN(len(broken))] = `{}[]":,\0 x`[rnd.IntN(11)] // anything but a panic will do
			}
			read(tt.vendor, tt.kind, string(broken[:i]), string(broken[i:]))
		}
	}
}

// TestBatchNeedsBudget: a batch is made only while something is left of each token and dollar limit that applies. It
// takes nothing of them itself, until its results are read.
func TestBatchNeedsBudget(t *testing.T) {
	t.Parallel()
	p, _ := newBatchTest(t, "anthropic", "")
	paths := map[string]string{"/v1/batches": newBatchBody,
		"/v1/messages/batches": `{"requests":[{"custom_id":"a","params":{"model":"claude-sonnet-5","max_tokens":9}}]}`}
	for _, c := range []struct {
		limit, status string
	}{
		{`{"count":"tokens","max":1,"per":"month"}`, "200"},
		{`{"count":"dollars","max":0.00001,"per":"month"}`, "200"},
		{`{"count":"tokens","max":0,"per":"lifetime"}`, "429"},
		{`{"count":"dollars","max":0,"per":"day"}`, "429"},
		{`{"count":"tokens","max":0,"per":"day","for_each":"session"}`, "429"},
		{`{"count":"dollars","max":0,"per":"day","shadow":true}`, "200"},
		{`{"count":"tokens","max":0,"per":"day","endpoint":"/v1/chat/completions"}`, "200"},
	} {
		id, token := p.newToken(`"name":"l","policy":{"limits":[` + c.limit + `]}`)
		for path, body := range paths {
			for range 2 {
				if res := p.batchCall(token, "POST", path, body); strconv.Itoa(res.status) != c.status {
					t.Errorf("%s, %s: %d %s", c.limit, path, res.status, res.body)
				}
			}
			if res := p.batchCall(token, "GET", strings.Replace(path+"/x", "messages/batches/x", "messages/batches", 1),
				""); res.status != 200 { // reading one needs nothing
				t.Errorf("%s, GET %s: %d %s", c.limit, path, res.status, res.body)
			}
		}
		p.waitSettled()
		if l := p.currentLimits("/manage/tokens/" + id)[0]; !strings.Contains(c.limit, "for_each") &&
			l.Used+l.Reserved != 0 {
			t.Errorf("%s: used %v, reserved %v", c.limit, l.Used, l.Reserved)
		}
	}
}
