// SQL for the audit trail, and the one way to change what administrators
// manage: change, which writes the entry in the same transaction. No entry, no
// change.
package main

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// An auditEntry is a row of the trail. prev is the mac of the row before it.
type auditEntry struct {
	seq int64
	auditOrigin
	action, object, detail string
	prev, mac              []byte
}

// An auditHead says which entry is the last. Without it, nobody could tell that
// the last ones were removed.
type auditHead struct {
	seq int64
	mac []byte
}

// String is what an operator notes elsewhere, to compare with later.
func (h auditHead) String() string {
	return strconv.FormatInt(h.seq, 10) + ":" + hex.EncodeToString(h.mac)
}

func parseAuditHead(s string) (h auditHead, err error) {
	seq, mac, _ := strings.Cut(s, ":")
	if h.seq, err = strconv.ParseInt(seq, 10, 64); err == nil {
		h.mac, err = hex.DecodeString(mac)
	}
	if err != nil || h.seq < 1 || len(h.mac) != sha256.Size {
		return auditHead{}, errors.New("an audit head looks like 57:ab12…, with 64 hexadecimal digits")
	}
	return h, nil
}

// An auditChain makes and checks the MACs. Its key is one of its own, random
// and sealed with the encryption key: the chain outlives a change of that.
type auditChain struct{ key secret }

// newAuditChain returns a chain with a new key, and the key sealed.
func newAuditChain(sl *sealer) (*auditChain, string, error) {
	text := newEncryptionKey()
	c, err := deriveAuditChain(text)
	return c, base64.StdEncoding.EncodeToString(sl.seal(text, auditKeyContext)), err
}

// openAuditChain returns the chain whose key was sealed.
func openAuditChain(sl *sealer, sealed string) (*auditChain, error) {
	raw, err := base64.StdEncoding.DecodeString(sealed)
	if err != nil {
		return nil, errUnseal
	}
	text, err := sl.open(raw, auditKeyContext)
	if err != nil {
		return nil, err
	}
	return deriveAuditChain(text)
}

func deriveAuditChain(text secret) (*auditChain, error) {
	key, err := hkdf.Key(sha256.New, []byte(text()), nil, "llm-proxy audit mac v1", sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("deriving the audit key: %w", err)
	}
	return &auditChain{newSecret(string(key))}, nil
}

// mac is the MAC over a label, numbers and texts. Each text has its length
// before it, so that no two lists of them are the same bytes.
func (c *auditChain) mac(label string, numbers []int64, texts ...string) []byte {
	var b []byte
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	for _, t := range append([]string{label}, texts...) {
		b = binary.BigEndian.AppendUint64(b, uint64(len(t)))
		b = append(b, t...)
	}
	m := hmac.New(sha256.New, []byte(c.key()))
	m.Write(b)
	return m.Sum(nil)
}

func (c *auditChain) entryMAC(e *auditEntry) []byte {
	return c.mac("entry", []int64{e.seq, e.at}, e.actorID, string(e.role), e.address, e.requestID, e.action, e.object, e.detail, string(e.prev))
}

// signHead writes a head as it is stored; open reads it back, and reports false for
// what this chain's key has not made.
func (c *auditChain) signHead(h auditHead) string {
	return h.String() + ":" + hex.EncodeToString(c.mac("head", []int64{h.seq}, string(h.mac)))
}

func (c *auditChain) verifyHead(stored string) (auditHead, bool) {
	text := stored[:max(strings.LastIndexByte(stored, ':'), 0)]
	h, err := parseAuditHead(text)
	return h, err == nil && hmac.Equal([]byte(c.signHead(h)), []byte(stored))
}

// appendEntry makes e the entry that follows the one that h names. emptyAuditHead is where a
// chain begins; an entry after one that is missing or altered begins anew, and
// the break stays to be seen.
func (c *auditChain) appendEntry(h auditHead, e *auditEntry) auditHead {
	e.seq, e.prev = h.seq+1, h.mac
	e.mac = c.entryMAC(e)
	return auditHead{e.seq, e.mac}
}

func emptyAuditHead(seq int64) auditHead { return auditHead{seq, make([]byte, sha256.Size)} }

// An auditCheck goes through a trail from its first entry to its head.
type auditCheck struct {
	chain           *auditChain
	lastHead        auditHead // of the entry before
	firstEntry      auditEntry
	newestAt        int64 // at of the newest entry
	expectedHead    *auditHead
	expectedFound   bool // the expected entry was there
	problems        []string
	omittedProblems int   // problems that were too many to keep
	firstProblemSeq int64 // seq of the first of them
}

const maxAuditProblems = 20

func (k *auditCheck) addProblem(seq int64, format string, args ...any) {
	if len(k.problems) == 0 || seq < k.firstProblemSeq {
		k.firstProblemSeq = seq
	}
	if len(k.problems) == maxAuditProblems {
		k.omittedProblems++
		return
	}
	k.problems = append(k.problems, fmt.Sprintf(format, args...))
}

// add looks at the next entry.
func (k *auditCheck) add(e *auditEntry) {
	want := k.lastHead.seq + 1
	if e.seq < want { // below the first: the database has no two with the same seq
		k.addProblem(e.seq, "entry %d was not written by this program", e.seq)
		return
	}
	if e.seq > want {
		k.addMissing(want, e.seq-1)
	}
	if !hmac.Equal(k.chain.entryMAC(e), e.mac) {
		k.addProblem(e.seq, "entry %d was changed, or was not written by this program", e.seq)
	} else if e.seq == want && !hmac.Equal(e.prev, k.lastHead.mac) {
		k.addProblem(e.seq, "entry %d was not written after the entry %d that is there", e.seq, k.lastHead.seq)
	}
	if k.expectedHead != nil && e.seq == k.expectedHead.seq {
		k.expectedFound = hmac.Equal(e.mac, k.expectedHead.mac)
	}
	if k.firstEntry.seq == 0 {
		k.firstEntry = *e
	}
	k.lastHead, k.newestAt = auditHead{e.seq, e.mac}, max(k.newestAt, e.at)
}

func (k *auditCheck) addMissing(from, to int64) {
	if from == to {
		k.addProblem(from, "entry %d is missing", from)
		return
	}
	k.addProblem(from, "entries %d to %d are missing", from, to)
}

// finish compares with the head, which is ok if this program wrote it, after
// all entries up to it have been added. beyond is the seq of the last entry that
// there is.
func (k *auditCheck) finish(h auditHead, ok bool, beyond int64) {
	switch {
	case !ok:
		k.addProblem(k.lastHead.seq+1, "the record of the last entry is missing or was changed: whether entries after %d were removed cannot be told", k.lastHead.seq)
	case h.seq > k.lastHead.seq:
		k.addMissing(k.lastHead.seq+1, h.seq)
	case !hmac.Equal(h.mac, k.lastHead.mac):
		k.addProblem(h.seq, "entry %d is not the one that was written as the last", h.seq)
	}
	if ok && beyond > h.seq {
		k.addProblem(h.seq+1, "there are entries after %d, which was the last", h.seq)
	}
	if k.expectedHead != nil && !k.expectedFound {
		k.addProblem(k.expectedHead.seq, "entry %d is not the one that was noted", k.expectedHead.seq)
	}
}

func (k *auditCheck) intact() bool { return len(k.problems) == 0 }

// String says what a whole trail holds.
func (k *auditCheck) String() string {
	day := func(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }
	return fmt.Sprintf("%d entries, from %s to %s", k.lastHead.seq, day(k.firstEntry.at), day(k.newestAt))
}

// priorUseNotice says what the trail cannot tell because the database was in use
// when it began, "" if it was new.
func (k *auditCheck) priorUseNotice() string {
	var was struct {
		Projects, Tokens int64
		Keys             int64 `json:"management_keys"`
	}
	if json.Unmarshal([]byte(k.firstEntry.detail), &was) != nil || was.Projects+was.Tokens+was.Keys == 0 {
		return ""
	}
	return fmt.Sprintf("It begins in a database that already had %d projects, %d tokens and %d management keys: "+
		"that is an upgrade from a version without a trail, or somebody removed the whole trail before then.", was.Projects, was.Tokens, was.Keys)
}

// auditSchemaVersion is the version of the schema that brought the trail.
const auditSchemaVersion = 2

// withAuditedTx runs do in one write transaction, and puts the act that it returns
// into the audit trail in the same one.
func (s *store) withAuditedTx(ctx context.Context, by auditOrigin, do func(*sql.Tx) (auditEvent, error)) error {
	var seq int64
	err := s.withTx(ctx, func(tx *sql.Tx) error {
		a, err := do(tx)
		if err != nil {
			return err
		}
		seq, err = s.appendAuditEntry(ctx, tx, by, a)
		return err
	})
	for was := s.lastAuditSeq.Load(); err == nil && was < seq; was = s.lastAuditSeq.Load() {
		s.lastAuditSeq.CompareAndSwap(was, seq) // who committed later may have been here before
	}
	return err
}

// recordAuditEvent puts something into the audit trail that changes nothing here, such as a
// sign-in. Who notes an act must not let it happen when that fails.
func (s *store) recordAuditEvent(ctx context.Context, by auditOrigin, a auditEvent) error {
	return s.withAuditedTx(ctx, by, func(*sql.Tx) (auditEvent, error) { return a, nil })
}

// appendAuditEntry adds an entry at the trail's end and returns its seq. An end that
// somebody has tampered with does not stop it, for tokens must be revocable all
// the same: the entry then follows none, which checkAudit finds ever after. An
// end before one that this process has seen is one that was put back.
func (s *store) appendAuditEntry(ctx context.Context, tx *sql.Tx, by auditOrigin, a auditEvent) (int64, error) {
	if s.chain == nil {
		return 0, errors.New("the audit trail is not open")
	}
	var stored string
	var newest int64
	err := tx.QueryRowContext(ctx, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''), (SELECT coalesce(max(seq), 0) FROM audit)`).
		Scan(&stored, &newest)
	if err != nil {
		return 0, fmt.Errorf("reading the end of the audit trail: %w", err)
	}
	head, ok := s.chain.verifyHead(stored)
	if seen := max(newest, s.lastAuditSeq.Load()); !ok || seen > head.seq {
		head = emptyAuditHead(seen)
	}
	e := &auditEntry{auditOrigin: by, action: a.action, object: a.object, detail: a.detailJSON()}
	head = s.chain.appendEntry(head, e)
	if _, err := tx.ExecContext(ctx, `
		INSERT INTO audit (seq, at, actor, role, address, request_id, action, object, detail, prev, mac)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		e.seq, e.at, e.actorID, string(e.role), e.address, e.requestID, e.action, e.object, e.detail, e.prev, e.mac); err != nil {
		return 0, fmt.Errorf("writing the audit trail: %w", err)
	}
	return e.seq, setSettingTx(ctx, tx, "audit_head", s.chain.signHead(head))
}

func setSettingTx(ctx context.Context, tx *sql.Tx, name, value string) error {
	if _, err := tx.ExecContext(ctx, `
		INSERT INTO settings (name, value) VALUES (?, ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value); err != nil {
		return fmt.Errorf("writing the setting %s: %w", name, err)
	}
	return nil
}

// openAudit makes s able to change things, with the chain that the database has.
// A database without one gets it, with a first entry that says what was there
// already. One that has entries and no key for them is not served.
func (s *store) openAudit(ctx context.Context, sl *sealer, by auditOrigin) (err error) {
	if s.chain, err = s.loadAuditChain(ctx, sl); !errors.Is(err, errNotFound) {
		return err
	}
	var sealed string
	if s.chain, sealed, err = newAuditChain(sl); err != nil {
		return err
	}
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		var entries, projects, tokens, keys int64
		if err := tx.QueryRowContext(ctx, `
			SELECT (SELECT coalesce(max(seq), 0) FROM audit), (SELECT coalesce(max(seq), 0) FROM projects),
				(SELECT coalesce(max(seq), 0) FROM tokens), (SELECT coalesce(max(seq), 0) FROM management_keys)`).
			Scan(&entries, &projects, &tokens, &keys); err != nil {
			return auditEvent{}, fmt.Errorf("beginning the audit trail: %w", err)
		}
		if entries > 0 {
			return auditEvent{}, errors.New("the audit trail has entries, but its key was removed from the database; bring back a backup with llm-proxy restore FILE")
		}
		return auditEvent{actionAuditBegin, "", []auditField{{"projects", projects}, {"tokens", tokens}, {"management_keys", keys}}},
			setSettingTx(ctx, tx, "audit_key", sealed)
	})
}

// loadAuditChain returns the chain that the database has, or errNotFound.
func (s *store) loadAuditChain(ctx context.Context, sl *sealer) (*auditChain, error) {
	sealed, err := s.setting(ctx, "audit_key")
	if err != nil {
		return nil, err
	}
	chain, err := openAuditChain(sl, sealed)
	if err != nil {
		return nil, fmt.Errorf("the key of the audit trail: %w", err)
	}
	return chain, nil
}

// loadAuditHead returns the trail's end, and false if this program did not write it.
// newest is the seq of the last entry that is there, at the same moment.
func (s *store) loadAuditHead(ctx context.Context, chain *auditChain) (h auditHead, ok bool, newest int64, err error) {
	var stored string
	err = s.readDB.QueryRowContext(ctx, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''), (SELECT coalesce(max(seq), 0) FROM audit)`).
		Scan(&stored, &newest)
	if err != nil {
		return h, false, 0, fmt.Errorf("reading the end of the audit trail: %w", err)
	}
	h, ok = chain.verifyHead(stored)
	return h, ok, newest, nil
}

// verifyAudit goes through the whole trail, as it ends now: others may write on.
func (s *store) verifyAudit(ctx context.Context, chain *auditChain, expect *auditHead) (*auditCheck, error) {
	k := &auditCheck{chain: chain, lastHead: emptyAuditHead(0), expectedHead: expect}
	h, ok, newest, err := s.loadAuditHead(ctx, chain)
	if err != nil {
		return nil, err
	}
	until := h.seq
	if !ok {
		until = newest
	}
	// From below 1: a row may have been put there.
	for after, full := int64(math.MinInt64), true; full; {
		page, err := s.auditPage(ctx, after, until)
		if err != nil {
			return nil, err
		}
		for i := range page {
			k.add(&page[i])
			after = page[i].seq
		}
		full = len(page) == auditPageSize
	}
	k.finish(h, ok, newest)
	return k, nil
}

const auditPageSize = 1000

const auditColumns = `a.seq, a.at, a.actor, a.role, a.address, a.request_id, a.action, a.object, a.detail, a.prev, a.mac`

func (e *auditEntry) scan(row interface{ Scan(...any) error }, more ...any) error {
	return row.Scan(append([]any{&e.seq, &e.at, &e.actorID, &e.role, &e.address, &e.requestID, &e.action, &e.object, &e.detail, &e.prev, &e.mac}, more...)...)
}

// auditPage returns entries in the order in which they were written.
func (s *store) auditPage(ctx context.Context, after, until int64) ([]auditEntry, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+auditColumns+` FROM audit a WHERE a.seq > ? AND a.seq <= ? ORDER BY a.seq LIMIT ?`, after, until, auditPageSize)
	if err != nil {
		return nil, fmt.Errorf("reading the audit trail: %w", err)
	}
	defer rows.Close()
	out := make([]auditEntry, 0, auditPageSize)
	for rows.Next() {
		var e auditEntry
		if err := e.scan(rows); err != nil {
			return nil, fmt.Errorf("reading the audit trail: %w", err)
		}
		out = append(out, e)
	}
	return out, rows.Err()
}

// An auditFilter says which entries a list holds; "" is all. It goes on below
// the entry with beforeAt and beforeSeq.
type auditFilter struct {
	actor, action, object string
	from, to              int64
	beforeAt, beforeSeq   int64
	limit                 int
}

// An auditRow is an entry for people: name is what the actor's key is called now.
type auditRow struct {
	auditEntry
	actorName string
}

// listAudit returns up to f.limit entries, newest first. Each of the four cases
// walks an index of its own.
func (s *store) listAudit(ctx context.Context, f auditFilter) ([]auditRow, error) {
	const head = `SELECT ` + auditColumns + `, coalesce(k.name, '') FROM audit a LEFT JOIN management_keys k ON k.id = a.actor
		WHERE a.at >= ?1 AND a.at < ?2 AND (a.at, a.seq) < (?3, ?4) AND `
	const tail = ` ORDER BY a.at DESC, a.seq DESC LIMIT ?5`
	query := head + `?6 = '' AND ?7 = '' AND ?8 = ''` + tail
	switch {
	case f.object != "":
		query = head + `a.object = ?6 AND (?7 = '' OR a.actor = ?7) AND (?8 = '' OR a.action = ?8)` + tail
	case f.actor != "":
		query = head + `?6 = '' AND a.actor = ?7 AND (?8 = '' OR a.action = ?8)` + tail
	case f.action != "":
		query = head + `?6 = '' AND ?7 = '' AND a.action = ?8` + tail
	}
	rows, err := s.readDB.QueryContext(ctx, query, f.from, f.to, f.beforeAt, f.beforeSeq, f.limit, f.object, f.actor, f.action)
	if err != nil {
		return nil, fmt.Errorf("listing the audit trail: %w", err)
	}
	defer rows.Close()
	var out []auditRow
	for rows.Next() {
		var r auditRow
		if err := r.scan(rows, &r.actorName); err != nil {
			return nil, fmt.Errorf("listing the audit trail: %w", err)
		}
		out = append(out, r)
	}
	return out, rows.Err()
}
