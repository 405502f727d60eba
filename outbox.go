// This file keeps the rows of calls that have ended in a file while the database takes none of them. The ledger goes on
// trying to write them from memory; the file is for the case that the program is killed before it succeeds. The next
// start records what the file has, each call once, and removes it. Each line is signed with the key of the audit trail,
// which each database has for itself: the rows of another database, or of whoever can write to the directory, are
// refused. Calls that were running when a process died are recorded here, too, as lost. The file opens no secret, and
// has no stored content of calls.
//
// Why a row is recorded once, whenever the program is killed: the row of a call has an id, by which it is found. What
// only counts in sums has none, so each row has the number of its place in the queue of its process. The writer takes
// the whole queue each time, and before the file has a line, its transactions begin to contain the number of the last
// row (outboxMark). A start skips what that number covers, and its own transactions raise it.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// outboxInterval is how often rows are kept, and so how many share one sync of the disk.
	outboxInterval = 250 * time.Millisecond
	// outboxDelay is how long a commit may take before the rows in it are kept.
	outboxDelay = time.Second
	// outboxRows is how many rows are kept at one time: the ledger waits meanwhile.
	outboxRows = 500
	// maxOutboxBytes bounds the file. So do the running calls: none is admitted while the database takes no rows.
	maxOutboxBytes = 64 << 20
)

// An outbox is the file of one process. It belongs to the goroutine of ledger.runOutbox. The ledger's mu guards inUse
// and keptUpTo, which others read.
type outbox struct {
	name  string
	id    string // names this outbox in its lines and in the database
	chain *auditChain
	log   *slog.Logger

	file    *os.File // nil: there is none
	size    int64
	kept    map[*requestRow]bool // rows with a line in the file
	failing bool                 // the last attempt failed, which was reported

	inUse    bool   // there may be a file
	keptUpTo uint64 // once as many queued rows are committed, the file is of no use
}

// newOutbox returns the outbox of a process, which makes no file yet.
func newOutbox(name string, chain *auditChain, log *slog.Logger) *outbox {
	return &outbox{name: name, id: strconv.FormatInt(time.Now().UnixNano(), 36), chain: chain, log: log,
		kept: map[*requestRow]bool{}}
}

// The form of a line: a signature, and the JSON of an unwrittenRow.

// An unwrittenRow is a row that the database did not take.
type unwrittenRow struct {
	Outbox  string
	Number  uint64            // as in an outboxMark
	SumOnly bool              // it only counts in the sums
	Late    []lateLeaseUse    `json:",omitempty"` // as in a sumOnlyRow
	Fields  []json.RawMessage // of requestRow.durableFields
	row     *requestRow
}

// appendLine appends a row as the line with a number.
func (o *outbox) appendLine(lines []byte, r *requestRow, number uint64, sumOnly bool, late ...lateLeaseUse) (
	[]byte, error) {
	u := unwrittenRow{Outbox: o.id, Number: number, SumOnly: sumOnly, Late: late}
	for _, field := range r.durableFields() {
		text, err := json.Marshal(field)
		if err != nil {
			return lines, fmt.Errorf("the row of a call has no JSON: %w", err)
		}
		u.Fields = append(u.Fields, text)
	}
	line, err := json.Marshal(u)
	if err != nil {
		return lines, fmt.Errorf("the row of a call has no JSON: %w", err)
	}
	lines = hex.AppendEncode(lines, o.chain.mac("outbox", nil, string(line)))
	return append(append(append(lines, ' '), line...), '\n'), nil
}

// errTornLine means that a line was not written to its end.
var errTornLine = errors.New("its last line was not written to its end")

// parseUnwritten reads a line of appendLine.
func parseUnwritten(chain *auditChain, line []byte) (*unwrittenRow, error) {
	text, complete := bytes.CutSuffix(line, []byte("\n"))
	mac, text, _ := bytes.Cut(text, []byte(" "))
	if want := hex.AppendEncode(nil, chain.mac("outbox", nil, string(text))); !hmac.Equal(mac, want) {
		switch signed := len(mac) == len(want) && json.Valid(text); {
		case !complete && !json.Valid(line) && !signed:
			return nil, errTornLine
		case signed:
			return nil, errors.New("its rows are signed by another database, or damaged; put it beside that " +
				"database, or move it away")
		}
		return nil, errors.New("it was made by another version, or is damaged; start that version, or move it away")
	}
	u := &unwrittenRow{row: &requestRow{}}
	fields := u.row.durableFields()
	if err := json.Unmarshal(text, u); err != nil || len(u.Fields) != len(fields) {
		return nil, errors.New("it was made by another version; start that one, or move it away")
	}
	for i, field := range fields {
		if err := json.Unmarshal(u.Fields[i], field); err != nil {
			return nil, fmt.Errorf("a row has an unexpected value: %w; start the version that made it, or move it away",
				err)
		}
	}
	return u, nil
}

// What a running process keeps.

// markOf returns a mark with a number for the writer's next transaction. The caller holds the ledger's mu. SQLite's
// transactions are committed or not, so they need no mark before there is a file. One of PostgreSQL may be committed
// although the answer was lost, and the file has its rows afterwards.
func (l *ledger) markOf(number uint64) (m outboxMark) {
	if l.outbox != nil && (l.outbox.inUse || l.store.backend != nil) {
		m = outboxMark{id: l.outbox.id, number: number, running: true}
	}
	return m
}

// runOutbox keeps rows until the writer has ended.
func (l *ledger) runOutbox() {
	defer close(l.outboxDone)
	if l.outbox == nil {
		return
	}
	tick := time.NewTicker(outboxInterval)
	defer tick.Stop()
	for {
		select {
		case <-l.done:
			return
		case <-tick.C:
		}
		l.outbox.report(l.keepRows(false))
		l.dropOutbox()
	}
}

// keepRows writes all rows to the file that wait for the database, if it does not work or, with always, in any case.
func (l *ledger) keepRows(always bool) error {
	o := l.outbox
	for {
		lines, rows, err := l.unkeptRows(always)
		if err != nil || len(rows) == 0 {
			return err
		}
		if err := o.append(lines); err != nil {
			return err
		}
		if len(o.kept) == 0 {
			o.log.Warn("the database takes no calls; those that have ended are kept in a file until it does",
				"file", o.name)
		}
		for _, r := range rows {
			o.kept[r] = true
		}
	}
}

// unkeptRows returns the next rows that the file does not have, as lines. The outbox is in use from then on.
func (l *ledger) unkeptRows(always bool) (lines []byte, rows []*requestRow, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	slow := len(l.writing) > 0 && time.Since(l.writingSince) > outboxDelay
	if !always && !slow && !l.failing.Load() {
		return nil, nil, nil
	}
	add := func(r *requestRow, number uint64, sumOnly bool, late ...lateLeaseUse) {
		if err != nil || len(rows) == outboxRows || l.outbox.kept[r] {
			return
		}
		lines, err = l.outbox.appendLine(lines, r, number, sumOnly, late...)
		rows = append(rows, r)
	}
	for _, e := range l.writing {
		add(&e.row, e.number, false)
	}
	for _, e := range l.settledEntries {
		add(&e.row, e.number, false)
	}
	for _, r := range l.sumOnlyRows { // not those that are being written, as no mark may cover them
		add(r.requestRow, r.number, true, r.late...)
	}
	if len(rows) > 0 {
		l.outbox.inUse, l.outbox.keptUpTo = true, l.queuedCount
	}
	return lines, rows, err
}

// append appends lines to the file and syncs it to disk: all of them, or none.
func (o *outbox) append(lines []byte) (err error) {
	if o.file != nil && !isAtPath(o.file, o.name) { // it was moved away
		o.close()
	}
	if o.file == nil {
		if err := o.open(); err != nil {
			return err
		}
	}
	if o.size+int64(len(lines)) > maxOutboxBytes {
		return fmt.Errorf("it would be larger than %d MiB", maxOutboxBytes>>20)
	}
	if _, err = o.file.Write(lines); err == nil {
		err = o.file.Sync()
	}
	if err != nil {
		return errors.Join(err, o.file.Truncate(o.size))
	}
	o.size += int64(len(lines))
	return nil
}

// open opens the file, or makes it.
func (o *outbox) open() error {
	f, err := openRegularFile(o.name, os.O_RDWR|os.O_CREATE|os.O_APPEND)
	if err != nil {
		return err
	}
	o.file = f
	if o.size, err = f.Seek(0, io.SeekEnd); err == nil && o.size > 0 { // put back while this process ran
		last := []byte{0}
		if _, err = f.ReadAt(last, o.size-1); err == nil && last[0] != '\n' {
			_, err = f.WriteString("\n")
			o.size++
		}
	}
	if err = errors.Join(err, f.Chmod(0o600), syncDir(filepath.Dir(o.name))); err != nil {
		o.close()
	}
	return err
}

// close closes the file. Its rows are kept again if they still wait.
func (o *outbox) close() {
	if o.file != nil {
		_ = o.file.Close()
	}
	o.file, o.size = nil, 0
	clear(o.kept)
}

// keepUnwritten keeps the rows that the closed ledger could not write, for the next start. fenced: this process may not
// write any more. databaseFile is "" with PostgreSQL.
func (l *ledger) keepUnwritten(fenced bool, databaseFile string) error {
	rows := len(l.settledEntries) + len(l.sumOnlyRows)
	if rows == 0 {
		return nil
	}
	what := "the database cannot be written; calls that ended are kept in a file, and the next start records them"
	reason := errFenced
	switch {
	case fenced:
		what = "calls that ended are kept in a file; the next start records those that are not recorded as lost"
	case databaseFile != "":
		what += ". If it is a locked file, find the program with: fuser " + databaseFile
		fallthrough
	default:
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		reason = cmp.Or(l.store.checkWritable(ctx), errors.New("it did not take the rows in time"))
	}
	if err := l.keepRows(true); err != nil {
		return fmt.Errorf("%d calls could not be recorded: the database cannot be written (%w), nor can %s: %w; "+
			"the next start records those that it knows as lost", rows, reason, l.outbox.name, err)
	}
	l.log.Error(what, "rows", rows, "file", l.outbox.name, "error", reason)
	return nil
}

// report logs an error that is new, and its end.
func (o *outbox) report(err error) {
	if failing := err != nil; failing != o.failing {
		if o.failing = failing; failing {
			o.log.Error("calls that have ended wait for the database, and cannot be kept in a file; if the program is "+
				"killed, they are recorded as lost, with estimates", "file", o.name, "error", err)
		} else {
			o.log.Info("calls that have ended can be kept in a file again", "file", o.name)
		}
	}
}

// dropOutbox removes the file once its rows are committed.
func (l *ledger) dropOutbox() {
	o := l.outbox
	if o == nil {
		return
	}
	l.mu.Lock()
	unused := o.inUse && l.committedCount >= o.keptUpTo && !l.failing.Load() && l.writingSince.IsZero()
	if unused {
		o.inUse = false // no transaction with a mark is under way, or begins
	}
	l.mu.Unlock()
	if !unused {
		return
	}
	rows := len(o.kept)
	o.close()
	if err := removeOutbox(context.Background(), l.store, o.name, o.id); err != nil {
		o.log.Error("a file of calls that are recorded cannot be removed; the next start does it", "file", o.name,
			"error", err)
		return
	}
	if rows > 0 { // otherwise the file could not be made
		o.log.Info("the calls that were kept in a file are recorded", "rows", rows, "file", o.name)
	}
}

// removeOutbox removes a file of which everything is recorded, and then what the database knows of it.
func removeOutbox(ctx context.Context, st *store, name string, ids ...string) error {
	err := os.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err = errors.Join(err, syncDir(filepath.Dir(name))); err != nil {
		return err
	}
	for _, id := range ids {
		if err := st.deleteSetting(ctx, outboxSetting+id); err != nil {
			return err
		}
	}
	return nil
}

// What a start records.

// recoverCalls records the calls that were running when a process died.
func (l *ledger) recoverCalls(ctx context.Context) error {
	recoverOne := func(ctx context.Context, w *ledgerWriter, replica int64) (int, error) {
		return recoverLost(ctx, l.store, w, l.newComplete(ctx), replica)
	}
	var lost int
	var err error
	if l.store.backend != nil {
		lost, err = l.store.backend.recoverClosed(ctx, recoverOne)
	} else {
		lost, err = recoverOne(ctx, l.writer, 0)
	}
	if lost > 0 {
		l.log.Warn("calls were running when the program died; they are recorded as lost, with estimated usage",
			"rows", lost)
	}
	return err
}

// recoverLost records the calls that were running when a replica died, with the estimates in their pending records, and
// returns how many. The replica must be closed: see pendingRecords. It may be repeated after an error.
func recoverLost(ctx context.Context, st *store, w *ledgerWriter, complete func(*requestRow) error, replica int64,
) (total int, err error) {
	for {
		rows, err := st.pendingRecords(ctx, replica, 1000)
		if err != nil {
			return 0, err
		}
		if len(rows) == 0 {
			return total, st.deletePending(ctx, replica)
		}
		records := make([]*requestRow, len(rows))
		for i := range rows {
			r := &rows[i]
			records[i] = r
			r.outcome, r.errorCode, r.source = outcomeLost, "process_died", usageEstimated
			r.firstByteUS, r.attempts = -1, 1
			r.requestedModel = r.model // the model that would have answered is unknown
			if err := complete(r); err != nil {
				return 0, err
			}
		}
		if err := w.writeOrReduce(ctx, ledgerBatch{records: records}); err != nil {
			return 0, fmt.Errorf("recording lost calls: %w", err)
		}
		total += len(rows)
	}
}

// readOutbox returns the rows in a file, those of each process in the order in which it has queued them. torn: the file
// ended within a line, which was skipped.
func readOutbox(chain *auditChain, name string) (all []*unwrittenRow, torn bool, err error) {
	f, err := openRegularFile(name, os.O_RDONLY)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 2*maxOutboxBytes))
	if err != nil {
		return nil, false, err
	}
	if len(text) == 2*maxOutboxBytes {
		return nil, false, errors.New("it is too large; move it away")
	}
	for line := range bytes.Lines(text) {
		u, err := parseUnwritten(chain, line)
		if torn = errors.Is(err, errTornLine); err != nil && !torn {
			return nil, false, err
		}
		if !torn {
			all = append(all, u)
		}
	}
	slices.SortStableFunc(all, func(a, b *unwrittenRow) int {
		return cmp.Or(strings.Compare(a.Outbox, b.Outbox), cmp.Compare(a.Number, b.Number))
	})
	return all, torn, nil
}

// recordOutbox records the rows in a file, and removes it. Rows that are recorded already are skipped: an earlier start
// may have died before it removed the file, or another replica has recorded a call as lost. The file has rows of
// several processes if one of them could not remove it. torn is as from readOutbox.
func recordOutbox(ctx context.Context, st *store, name string) (rows int, torn bool, err error) {
	all, torn, err := readOutbox(st.chain, name)
	if err != nil {
		return 0, false, err
	}
	writer := st.newLedgerWriter()
	defer writer.close()
	var ids []string
	for len(all) > 0 {
		n := slices.IndexFunc(all, func(u *unwrittenRow) bool { return u.Outbox != all[0].Outbox })
		if n < 0 {
			n = len(all)
		}
		ids = append(ids, all[0].Outbox)
		written, err := recordRows(ctx, st, writer, all[:n])
		if rows += written; err != nil {
			return rows, torn, err
		}
		all = all[n:]
	}
	return rows, torn, removeOutbox(ctx, st, name, ids...)
}

// recordUnwritten is recordOutbox for a start. There may be no file.
func recordUnwritten(ctx context.Context, st *store, log *slog.Logger, name string) error {
	rows, torn, err := recordOutbox(ctx, st, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("recording the calls that the database did not take, which %s has: %w (without it, those "+
			"that had begun are recorded as lost)", name, err)
	}
	if torn {
		log.Warn("the last line of a file of calls is skipped, because it was not written to its end", "file", name)
	}
	log.Warn("calls that the last stop could not write are recorded", "rows", rows, "file", name)
	return nil
}

// recordRows records those rows of one process that the database does not have, and returns how many. They are in the
// order of their numbers.
func recordRows(ctx context.Context, st *store, w *ledgerWriter, all []*unwrittenRow) (rows int, err error) {
	id := all[0].Outbox
	recorded, err := st.outboxNumber(ctx, id)
	if err != nil {
		return 0, err
	}
	for part := range slices.Chunk(all, outboxRows) {
		var b ledgerBatch
		for _, u := range part {
			if u.Number <= recorded { // or it is there twice
				continue
			}
			recorded = u.Number
			if u.SumOnly {
				b.sumOnlyRows = append(b.sumOnlyRows, sumOnlyRow{u.row, u.Number, u.Late})
				continue
			}
			known, err := st.isRecorded(ctx, u.row.id)
			if err != nil {
				return rows, err
			}
			if !known {
				b.records = append(b.records, u.row)
			}
		}
		b.delivered = outboxMark{id: id, number: recorded}
		if err := w.writeOrReduce(ctx, b); err != nil {
			return rows, err
		}
		rows += len(b.records) + len(b.sumOnlyRows)
	}
	return rows, nil
}

// outboxNumber returns the number up to which the rows of a process are recorded.
func (s *store) outboxNumber(ctx context.Context, id string) (uint64, error) {
	var committed uint64
	if s.backend != nil {
		n, err := s.backend.recordedRows(ctx, id)
		if err != nil {
			return 0, err
		}
		committed = uint64(n)
	}
	text, err := s.setting(ctx, outboxSetting+id)
	if errors.Is(err, errNotFound) {
		return committed, nil
	}
	if err != nil {
		return 0, err
	}
	recorded, err := strconv.ParseUint(text, 10, 64)
	return max(recorded, committed), err
}

// openRegularFile opens a file that is neither a link, a pipe nor a device.
func openRegularFile(name string, flags int) (*os.File, error) {
	f, err := os.OpenFile(name, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is not a regular file")
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// isAtPath reports whether an open file is still the one at a path.
func isAtPath(f *os.File, name string) bool {
	open, openErr := f.Stat()
	info, err := os.Lstat(name)
	return openErr == nil && err == nil && os.SameFile(open, info)
}
