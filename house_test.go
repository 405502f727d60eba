// Tests of what the ledger lets go: by age, by the size of the database, and
// that freed room is used again.
package main

import (
	"context"
	"strings"
	"testing"
	"time"
)

// record1000 writes batches of a thousand settled calls straight into the ledger,
// a second apart, from at on.
func (p *testProxy) record1000(at time.Time, batches int) {
	p.t.Helper()
	w := p.in.store.newLedgerWriter()
	defer w.close()
	for range batches {
		var b ledgerBatch
		for i := range 1000 {
			r := &requestRow{id: firstID(at) + int64(i), started: at.UnixMilli(), project: 1, token: 1, endpoint: "POST /v1/chat/completions",
				model: "gpt-4o-mini", address: "192.0.2.1", outcome: outcomeOK, status: 200, source: usageExact, firstByteUS: 1, attempts: 1, errorCode: strings.Repeat("x", 400)}
			b.records = append(b.records, r)
		}
		if err := w.write(context.Background(), b); err != nil {
			p.t.Fatal(err)
		}
		at = at.Add(time.Second)
	}
}

func (p *testProxy) sizes() (file, used int64, calls int64) {
	p.t.Helper()
	all, free, err := p.in.store.size(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := p.in.store.census(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	return all, all - free, c.calls
}

// TestShrink: beyond a size the oldest calls go and the newest stay, the room is
// used again without the file growing, and what cannot go is told.
func TestShrink(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	old := time.Now().Add(-48 * time.Hour)
	p.record1000(old, 12)
	file, used, _ := p.sizes()
	most := used / 2
	before := firstID(time.Now().Add(-sizeSpares))
	if over := p.in.ledger.shrink(t.Context(), 0, before); over != 0 {
		t.Error("no limit, but something was done")
	}
	for range 20 { // it stops after some steps, for calls to be written
		if over := p.in.ledger.shrink(t.Context(), most, before); over != 0 {
			t.Errorf("%d bytes too many", over)
		}
	}
	after, used, calls := p.sizes()
	if used > most || used < most*8/10 || calls == 0 || calls >= 12000 || after != file {
		t.Errorf("%d bytes of at most %d are in use, %d calls left; the file had %d bytes and has %d", used, most, calls, file, after)
	}
	rows, err := p.in.store.listRequests(t.Context(), requestFilter{before: firstID(old.Add(time.Hour)), limit: 1})
	if err != nil || len(rows) != 1 || rows[0].id>>idTimeShift != old.Add(11*time.Second).UnixMilli() {
		t.Errorf("the newest call did not stay: %v %v", rows, err)
	}
	p.record1000(old.Add(time.Hour), 5)
	if again, _, _ := p.sizes(); again != file {
		t.Errorf("the file grew from %d to %d bytes though it had room", file, again)
	}
	p.record1000(time.Now(), 1)
	for range 40 {
		if over := p.in.ledger.shrink(t.Context(), 1, before); over > 0 {
			break
		}
	}
	if _, _, calls := p.sizes(); calls != 1000 {
		t.Errorf("%d calls are left, want those of the last hour", calls)
	}
	if over := p.in.ledger.shrink(t.Context(), 1, before); over <= 0 {
		t.Error("nothing is said of what cannot go")
	}
	p.chat()
	if len(p.ledger()) == 0 {
		t.Error("no call on record")
	}
}

// TestHouseKeeping: the loop lets go of what is too old and too much, and says
// when it cannot.
func TestHouseKeeping(t *testing.T) {
	t.Parallel()
	p := newTest(t, nil)
	p.record1000(time.Now().Add(-48*time.Hour), 1)
	p.record1000(time.Now().Add(-30*time.Minute), 1)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan bool)
	go func() {
		p.in.ledger.keepHouse(ctx, retention{24 * time.Hour, 1}, time.Millisecond)
		close(done)
	}()
	waitFor(t, "old calls to go", func() bool { _, _, calls := p.sizes(); return calls == 1000 })
	waitFor(t, "a word on what stays", func() bool {
		return strings.Count(string(p.log.bytes()), "larger than MAX_DATABASE_BYTES") == 1
	})
	stop()
	<-done
}
