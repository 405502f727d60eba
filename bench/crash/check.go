// This file checks the ledger after a start against what the clients saw.
package main

import (
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// A row is one entry of GET /manage/requests.
type row struct {
	ID           string
	TokenID      string `json:"token_id"`
	Outcome      string
	Status       int
	UsageSource  string `json:"usage_source"`
	InputTokens  int    `json:"input_tokens"`
	OutputTokens int    `json:"output_tokens"`
	Attempts     int
	ErrorCode    string `json:"error_code"`
}

// longBefore is how long before the kill a call must have been complete for its settled row to be required. The ledger
// may hold a settled row in memory for a tenth of this time.
const longBefore = time.Second

// check compares what the clients saw since began with the ledger.
func (t *trial) check(began time.Time, calls []sight) error {
	killed := began
	for _, s := range calls {
		if s.id != "" && s.at.After(killed) {
			killed = s.at
		}
	}
	if err := t.read(began); err != nil {
		return err
	}
	for _, s := range calls {
		if s.id == "" {
			continue
		}
		t.seen++
		r, ok := t.rows[s.id]
		input, output := usageOf(s.seed)
		switch {
		case !ok && s.status < 500 && s.status != http.StatusTooManyRequests, !ok && s.seed%failEvery == 0 && s.status == http.StatusInternalServerError:
			t.violated("a client saw the answer %d to %s, but it has no row", s.status, s.id)
		case !ok: // refused: it need not have a row
		case r.TokenID != s.token.id:
			t.violated("%s is on record under another token", s.id)
		case s.status != http.StatusOK || !s.complete || killed.Sub(s.at) < longBefore:
			if r.Outcome == "ok" && (r.InputTokens != input || r.OutputTokens != output) {
				t.violated("%s used %d and %d tokens, but its row says %d and %d", s.id, input, output, r.InputTokens, r.OutputTokens)
			}
		case r.Outcome != "ok" || r.UsageSource != "exact" || r.InputTokens != input || r.OutputTokens != output:
			t.violated("%s was complete %v before the kill and used %d and %d tokens, but its row is %+v", s.id, killed.Sub(s.at), input, output, r)
		}
	}
	return t.checkCounts()
}

// read adds the rows since a time to the rows already read. A row that was settled must not have changed.
func (t *trial) read(since time.Time) error {
	after := ""
	for {
		var page struct {
			Data []row
			Next *string
		}
		query := url.Values{"limit": {"500"}, "from": {since.Add(-time.Second).UTC().Format(time.RFC3339)}}
		if after != "" {
			query.Set("after", after)
		}
		if err := t.proxy.manage("GET", "/manage/requests?"+query.Encode(), "", &page); err != nil {
			return err
		}
		for _, r := range page.Data {
			if r.Outcome == "open" {
				t.violated("%s is open after a start", r.ID)
			}
			if was, ok := t.rows[r.ID]; ok && was != r {
				t.violated("the row %+v is now %+v", was, r)
			}
			t.rows[r.ID] = r
		}
		if page.Next == nil || *page.Next == "" {
			return nil
		}
		after = *page.Next
	}
}

// checkCounts compares request counts, the limit and the sums with the rows.
func (t *trial) checkCounts() error {
	calls, outcomes := map[string]int{}, map[string]int{}
	for _, r := range t.rows {
		outcomes[r.Outcome]++
		if r.Outcome != "refused" || r.Attempts > 0 && r.ErrorCode != "ledger_unavailable" {
			calls[r.TokenID]++
		}
	}
	for _, tok := range t.tokens {
		var v struct {
			RequestCount int `json:"request_count"`
		}
		if err := t.proxy.manage("GET", "/manage/tokens/"+tok.id, "", &v); err != nil {
			return err
		}
		if v.RequestCount < tok.count {
			t.violated("the count of %s went from %d to %d", tok.id, tok.count, v.RequestCount)
		}
		if tok.count = v.RequestCount; tok.count != calls[tok.id] {
			t.violated("%s has %d rows, but the count %d", tok.id, calls[tok.id], tok.count)
		}
	}
	t.limited = *t.tokens[len(t.tokens)-1]
	if hits := int(t.provider.limited.Load()); hits > t.limited.count || t.limited.count > t.limited.limit {
		t.violated("of %d calls that the limited token may make, %d were made and %d counted", t.limited.limit, hits, t.limited.count)
	}
	var usage struct {
		Data []struct {
			Outcome string
			Calls   int
		}
	}
	if err := t.proxy.manage("GET", "/manage/usage?interval=total&group_by=outcome", "", &usage); err != nil {
		return err
	}
	sums := map[string]int{}
	for _, u := range usage.Data {
		sums[u.Outcome] = u.Calls
	}
	delete(sums, "refused") // not every refused call has a row
	delete(outcomes, "refused")
	if got, want := fmt.Sprint(sums), fmt.Sprint(outcomes); got != want {
		t.violated("the sums are %s, the rows %s", got, want)
	}
	return nil
}
