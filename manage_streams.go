// Handlers of /manage for the calls that are running now: who makes them, how
// far they are, and an end to one of them.
package main

import (
	"cmp"
	"net/http"
	"slices"
	"time"
)

type streamView struct {
	ID           string `json:"id"` // the request's
	StartedAt    stamp  `json:"started_at"`
	AgeMS        int64  `json:"age_ms"`
	ProjectID    string `json:"project_id"`
	ProjectName  string `json:"project_name"`
	TokenID      string `json:"token_id"`
	TokenName    string `json:"token_name"`
	UpstreamID   string `json:"upstream_id"`
	Endpoint     string `json:"endpoint"`
	Model        string `json:"model"` // as asked for
	Stream       bool   `json:"stream"`
	Address      string `json:"address"`
	State        string `json:"state"`         // ledger, provider, relaying or writing: what the call waits for
	Bytes        int64  `json:"bytes"`         // of the answer so far
	InputTokens  int64  `json:"input_tokens"`  // an estimate
	OutputTokens int64  `json:"output_tokens"` // so far, an estimate; of a streamed answer only
	seq          int64
}

// admittedCalls returns the running calls that were admitted, oldest first.
func (rc *runningCalls) admittedCalls(now time.Time) []streamView {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	out := make([]streamView, 0, len(rc.calls))
	for c := range rc.calls {
		if !c.admitted.Load() { // it may still be being read
			continue
		}
		out = append(out, streamView{c.requestID, stamp(c.start.UnixMilli()), now.Sub(c.start).Milliseconds(),
			c.project.id, c.project.name, c.state.id, c.state.name, c.shown.Load().id, c.endpoint.name(), c.fields.model, c.fields.stream, c.address,
			phaseNames[c.watch.phase.Load()], c.watch.answered.Load(), c.hold.ask.input, c.watch.output.Load(), c.id})
	}
	slices.SortFunc(out, func(a, b streamView) int { return cmp.Compare(a.seq, b.seq) })
	return out
}

// find returns an admitted call that runs, nil if there is none. Only what was
// there when it was admitted may be read of it.
func (rc *runningCalls) find(id int64) *call {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for c := range rc.calls {
		if c.id == id && c.admitted.Load() {
			return c
		}
	}
	return nil
}

// cut ends a call if it still runs.
func (rc *runningCalls) cut(c *call, why *apiError) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if _, ok := rc.calls[c]; ok {
		c.end(why)
	}
}

func (s *server) listStreams(r *manageRequest) (*reply, error) {
	page, err := r.page("project_id", "token_id")
	if err != nil {
		return nil, err
	}
	project, token := r.query.Get("project_id"), r.query.Get("token_id")
	var rows []streamView
	for _, v := range s.running.admittedCalls(r.now) {
		if v.seq > page.seq && (project == "" || v.ProjectID == project) && (token == "" || v.TokenID == token) {
			rows = append(rows, v)
		}
	}
	return &reply{body: pageOf(rows, page.limit,
		func(v *streamView) streamView { return *v },
		func(v *streamView) string { return cursor(v.seq, "") })}, nil
}

// cutStream ends a running call. Its client sees it break off; its row says who
// did it.
func (s *server) cutStream(r *manageRequest) (*reply, error) {
	c := s.running.find(parseRequestID(r.path("id")))
	if c == nil {
		return nil, errNotFound
	}
	if err := s.store.note(r.ctx, r.by, act{"stream.cut", c.requestID, []fact{{"project_id", c.project.id}, {"token_id", c.state.id}}}); err != nil {
		return nil, err // no audit, no change
	}
	s.running.cut(c, errCutByAdmin())
	return &reply{body: map[string]any{"id": r.path("id"), "deleted": true}}, nil
}

func errCutByAdmin() *apiError {
	return &apiError{status: http.StatusForbidden, code: "cut_by_administrator", msg: "An administrator ended this call."}
}
