// This file says what the audit trail is: what an entry holds, and how each is
// bound to the one before it, so that a changed, removed or added entry is
// found. Plain code: store_audit.go has the table, manage_usage.go the URL.
package main

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An auditOrigin is who does something, from where and when. Who has nothing to do
// with a request is actorSystem.
type auditOrigin struct {
	actorID   string // a management key's id, actorEnvironment, actorSystem; "": not known
	role      role
	address   string
	requestID string
	at        int64
}

const (
	actorEnvironment = "env"    // who holds MANAGEMENT_TOKEN
	actorSystem      = "system" // the program itself, at a start or a command
)

func systemOrigin(now time.Time) auditOrigin {
	return auditOrigin{actorID: actorSystem, at: now.UnixMilli()}
}

// What is done to stored things has an action of the form thing.verb, which
// stands where it is stored. These are the others.
const (
	actionAuditBegin   = "audit.begin"
	actionRestore      = "database.restore"
	actionSignIn       = "sign_in"
	actionSignInFailed = "sign_in_failed"
	actionSignOut      = "sign_out"
	actionExport       = "export"
	actionReveal       = "reveal"
)

// An auditEvent is what an entry says was done, and to which object.
type auditEvent struct {
	action, object string
	detail         []auditField
}

// An auditField is a named value in an entry's detail. No secret may be one: what
// prints as [secret] elsewhere does so here, but a plain string does not.
type auditField struct {
	name  string
	value any
}

// maxAuditValueBytes bounds the JSON of one value in a detail: what is longer, such as a
// long policy, is told by its length and hash.
const maxAuditValueBytes = 2 << 10

// diffAuditFields returns, for each fact that differs, the values before and after. A
// fact that one side lacks is null there; nil is a thing that is not there at
// all.
func diffAuditFields(before, after []auditField) (out []auditField) {
	value := func(of []auditField, name string) []byte {
		i := slices.IndexFunc(of, func(f auditField) bool { return f.name == name })
		if i < 0 {
			return []byte("null")
		}
		return auditValueJSON(of[i].value)
	}
	names := after
	if after == nil {
		names = before
	}
	for _, f := range names {
		was, is := value(before, f.name), value(after, f.name)
		if !bytes.Equal(was, is) {
			out = append(out, auditField{f.name, [2]json.RawMessage{digestLongValue(was), digestLongValue(is)}})
		}
	}
	return out
}

// auditValueJSON is a value's JSON. What has none is a mistake of ours, which must not
// keep a token from being revoked.
func auditValueJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		return []byte(`"?"`)
	}
	return b
}

// auditTime and auditDollars are values as /manage shows them.
func auditTime(ms *int64) any {
	if ms == nil {
		return nil
	}
	return time.UnixMilli(*ms).UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

func auditDollars(pico *int64) any {
	if pico == nil {
		return nil
	}
	return json.Number(formatDollars(*pico))
}

func digestLongValue(value []byte) []byte {
	if len(value) <= maxAuditValueBytes {
		return value
	}
	hash := sha256.Sum256(value)
	return fmt.Appendf(nil, `{"bytes":%d,"sha256":"%x"}`, len(value), hash)
}

// detailJSON is the detail as an object.
func (a *auditEvent) detailJSON() string {
	out := []byte("{")
	for i, f := range a.detail {
		if i > 0 {
			out = append(out, ',')
		}
		value := auditValueJSON(f.value)
		if len(value) > 3*maxAuditValueBytes { // a pair has been clipped on both sides
			value = digestLongValue(value)
		}
		out = append(append(out, auditValueJSON(f.name)...), ':')
		out = append(out, value...)
	}
	return string(append(out, '}'))
}

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
