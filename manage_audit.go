// This room is where requests meet the audit trail: who is said to have done
// something, failed sign-ins, and GET /manage/audit. It adds entries and reads
// them; there is nothing that changes one.
package main

import (
	"context"
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// originOf says who makes a request, for the audit trail.
func (s *server) originOf(w http.ResponseWriter, r *http.Request, who actor, now time.Time) origin {
	return origin{actor: who.id, role: who.role, address: s.clientAddress(r), requestID: w.Header().Get("X-Request-Id"), at: now.UnixMilli()}
}

// failureNotes decides which wrong management keys get an entry of their own.
// Anyone can present one, and entries are kept for ever: so a few a minute, not
// too many a day, and the number of those left out.
type failureNotes struct {
	mu              sync.Mutex
	minute, day     int64
	inMinute, inDay int
	left            int64
}

const (
	notedInMinute = 10
	notedInDay    = 500
)

// take reports whether an entry may be made now.
func (f *failureNotes) take(now time.Time) bool {
	if m := now.Unix() / 60; m != f.minute {
		f.minute, f.inMinute = m, 0
	}
	if d := now.Unix() / 86_400; d != f.day {
		f.day, f.inDay = d, 0
	}
	if f.inMinute >= notedInMinute || f.inDay >= notedInDay {
		return false
	}
	f.inMinute++
	f.inDay++
	return true
}

// note reports whether a failure gets an entry, and how many before it got none.
func (f *failureNotes) note(now time.Time) (ok bool, left int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.take(now) {
		f.left++
		return false, 0
	}
	left, f.left = f.left, 0
	return true, left
}

// add counts n more that got no entry.
func (f *failureNotes) add(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left += n
}

// rest returns how many got no entry, for one that tells only that; 0: none, or
// it must wait. At the end it does not wait.
func (f *failureNotes) rest(now time.Time, end bool) (left int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left > 0 && (end || f.take(now)) {
		left, f.left = f.left, 0
	}
	return left
}

// signInFailed puts a wrong management key on the trail. by.actor is the key's
// id if it is one that was valid once. Whoever presented it is refused in any
// case, so trouble with the trail is for the log alone.
func (s *server) signInFailed(ctx context.Context, by origin, door string, now time.Time) {
	ok, left := s.wrongKeys.note(now)
	if !ok {
		return
	}
	s.noteFailure(ctx, by, door, left, 1)
}

// noteFailure adds an entry that tells of failed sign-ins: of so many that were
// left out before, and of one more or none. It waits no longer than a few seconds, but for as long as it needs:
// who presents a key must not be able to keep it off the trail by leaving.
func (s *server) noteFailure(ctx context.Context, by origin, door string, left, more int64) {
	a := act{action: actionSignInFailed, object: door}
	if left > 0 {
		a.detail = []fact{{"left_out", left}}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := s.store.note(ctx, by, a); err != nil {
		s.wrongKeys.add(left + more)
		s.log.Error("a failed sign-in could not be put on the audit trail", "request_id", by.requestID, "address", by.address, "error", err)
	}
}

// keepTrail notes, every so often and at the end, how many failed sign-ins were
// left out, and logs where the trail ends, if that is not where it was logged
// last: a log that is kept elsewhere shows later that nothing up to there was
// removed.
func (s *server) keepTrail(ctx context.Context, every time.Duration, logged int64) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for end := false; !end; {
		var now time.Time
		select {
		case <-ctx.Done():
			now, end = time.Now(), true
		case now = <-tick.C:
		}
		if left := s.wrongKeys.rest(now, end); left > 0 {
			s.noteFailure(ctx, systemOrigin(now), "", left, 0)
		}
		if h, ok, _, err := s.store.auditHead(context.WithoutCancel(ctx), s.store.chain); err == nil && ok && h.seq != logged {
			logged = h.seq
			s.log.Info("the audit trail ends here", "head", h.String())
		}
	}
}

type auditView struct {
	Seq       int64           `json:"seq"`
	At        stamp           `json:"at"`
	Actor     string          `json:"actor"`
	ActorName string          `json:"actor_name"` // what the key is called now
	Role      role            `json:"role"`
	Address   string          `json:"address"`
	RequestID string          `json:"request_id"`
	Action    string          `json:"action"`
	Object    string          `json:"object"`
	Detail    json.RawMessage `json:"detail"`
}

func showAudit(r *auditRow) auditView {
	v := auditView{r.seq, stamp(r.at), r.actor, r.name, r.role, r.address, r.requestID, r.action, r.object, json.RawMessage(r.detail)}
	if !json.Valid(v.Detail) { // somebody has edited it; the list must show it all the same
		v.Detail = factJSON(map[string]string{"unreadable": r.detail})
	}
	return v
}

// listAudit lists the audit trail, newest first.
func (s *server) listAudit(r *manageRequest) (*reply, error) {
	page, err := r.page("actor", "action", "object", "from", "to")
	if err != nil {
		return nil, err
	}
	f := auditFilter{actor: r.query.Get("actor"), action: r.query.Get("action"), object: r.query.Get("object"),
		from: math.MinInt64, to: math.MaxInt64, beforeAt: math.MaxInt64, beforeSeq: math.MaxInt64, limit: page.limit + 1}
	from, to, err := r.span(time.Time{}, time.Time{})
	if err != nil {
		return nil, err
	}
	if !from.IsZero() {
		f.from = from.UnixMilli()
	}
	if !to.IsZero() {
		f.to = to.UnixMilli()
	}
	if page.seq > 0 {
		f.beforeSeq = page.seq
		if f.beforeAt, err = strconv.ParseInt(page.name, 10, 64); err != nil {
			return nil, badRequest("invalid_value", "after", "after must be the value of next in an earlier answer.")
		}
	}
	rows, err := s.store.listAudit(r.ctx, f)
	if err != nil {
		return nil, err
	}
	return &reply{body: pageOf(rows, page.limit, showAudit, func(r *auditRow) string { return cursor(r.seq, strconv.FormatInt(r.at, 10)) })}, nil
}
