// Benchmark of the hottest SQL there is: a batch of calls, begun and settled.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkLedgerBatch writes batches of 50 calls, of one token or of as many
// tokens as calls.
func BenchmarkLedgerBatch(b *testing.B) {
	for _, tokens := range []int{1, 50} {
		b.Run(fmt.Sprintf("tokens=%d", tokens), func(b *testing.B) {
			file := filepath.Join(b.TempDir(), "ledger.db")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				b.Fatal(err)
			}
			st, err := openStore(b.Context(), file)
			if err != nil {
				b.Fatal(err)
			}
			defer st.close()
			w, ids := st.newLedgerWriter(), newIDSource(0)
			defer w.close()
			write := func(batch ledgerBatch, _ func()) {
				if err := w.write(context.Background(), batch); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				begun := &begunBatch{}
				var entries []*ledgerEntry
				for i := range 50 {
					now := time.Now()
					row := requestRow{id: ids.next(now), started: now.UnixMilli(), project: int64(1 + i%min(tokens, 5)), token: int64(1 + i%tokens),
						endpoint: "POST /v1/chat/completions", model: "gpt-4o", knownModel: true, status: 200, outcome: outcomeOK, source: usageExact,
						counts: tokenCounts{input: 900, output: 250}, cost: 400_000, priced: true,
						firstByteUS: int64(100_000 + i*20_000), totalUS: int64(300_000 + i*70_000), attempts: 1}
					begun.add(row.id, row.note(nil))
					entries = append(entries, &ledgerEntry{row: row, batch: begun})
				}
				write(batchOf(begun, nil, nil))
				write(batchOf(nil, entries, nil))
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/50, "µs/call")
			b.ReportMetric(0, "ns/op")
		})
	}
}
