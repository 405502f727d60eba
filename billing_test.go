// Tests of calls that cost money and count no tokens, and of names that clients
// make up.
package main

import (
	"fmt"
	"strings"
	"testing"
)

// TestBilledUnseen: what is billed without tokens counts as unpriced, never as
// nothing, and a picture's bytes are no tokens.
func TestBilledUnseen(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		path, answer, contentType string
		unpriced                  int64
	}{
		{"/v1/audio/speech", "binary", "audio/mpeg", 1},
		{"/v1/images/generations", `{"created":1,"data":[{"b64_json":"` + strings.Repeat("A", 100_000) + `"}]}`, "application/json", 1},
		{"/v1/moderations", `{"id":"modr-1","results":[]}`, "application/json", 0},
		{"/v1/responses/input_tokens", `{"object":"response.input_tokens","input_tokens":9}`, "application/json", 0},
	} {
		p := newTest(t, nil)
		p.provider.answer(func(pc *providerConn, _ recorded) bool {
			return pc.reply(200, c.answer, "Content-Type: "+c.contentType)
		})
		if res := p.do("POST", c.path, chatBody(), "Authorization", "Bearer "+p.token, "Content-Type", "application/json"); res.status != 200 {
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

// TestMadeUpModels: names that a client makes up get no sums without end, even
// where the provider takes them all.
func TestMadeUpModels(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.provider.answer(func(pc *providerConn, _ recorded) bool { return pc.reply(200, `{"choices":[]}`) })
	const calls = maxModelNames + 30
	for i := range calls {
		body := fmt.Sprintf(`{"model":"made-up-%d","messages":[]}`, i)
		if res := p.do("POST", "/v1/chat/completions", body, "Authorization", "Bearer "+p.token, "Content-Type", "application/json"); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	p.settle()
	var usage struct {
		Data []struct {
			Model string
			Calls int64
		}
	}
	p.manage("GET", "/manage/usage?interval=total&group_by=model", "", 200, &usage)
	for _, u := range usage.Data {
		if u.Model == "" && u.Calls != calls-maxModelNames {
			t.Errorf("%d calls are summed without a name, want %d", u.Calls, calls-maxModelNames)
		}
	}
	if len(usage.Data) != maxModelNames+1 {
		t.Errorf("%d names have sums, want %d", len(usage.Data), maxModelNames+1)
	}
}
