// This file defines the audit trail: what an entry contains, and how each is bound to the one before it, so
// that a changed, removed or inserted entry is found. Plain code: store_audit.go has the table,
// manage_usage.go the URL.
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

// An auditOrigin is who does something, from where and when. What no request causes is done by actorSystem.
type auditOrigin struct {
	actorID   string // a management key's id, actorEnvironment or actorSystem; "": unknown
	role      role
	address   string
	requestID string
	at        int64
}

const (
	actorEnvironment = "env"    // whoever presents MANAGEMENT_TOKEN
	actorSystem      = "system" // the program itself, when it starts or runs a command
)

func systemOrigin(now time.Time) auditOrigin {
	return auditOrigin{actorID: actorSystem, at: now.UnixMilli()}
}

// A change of a stored object has an action of the form object.verb, which is in the function that stores
// it. These are the other actions.
const (
	actionAuditBegin   = "audit.begin"
	actionRestore      = "database.restore"
	actionSignIn       = "sign_in"
	actionSignInFailed = "sign_in_failed"
	actionSignOut      = "sign_out"
	actionExport       = "export"
	actionReveal       = "reveal"
)

// An auditEvent is what was done, and to which object.
type auditEvent struct {
	action, object string
	detail         []auditField
}

// An auditField is a named value in an entry's detail. It must not be a secret: a value of type secret is
// encoded as [secret], but a plain string is not.
type auditField struct {
	name  string
	value any
}

// maxAuditValueBytes bounds the JSON of one value in a detail. A longer one, such as a long policy, is
// recorded by its length and hash.
const maxAuditValueBytes = 2 << 10

// diffAuditFields returns the fields that differ, each with its values before and after. A field that one
// side lacks is null there. before is nil for a new object, after for one that was deleted.
func diffAuditFields(before, after []auditField) (out []auditField) {
	valueJSON := func(fields []auditField, name string) []byte {
		i := slices.IndexFunc(fields, func(f auditField) bool { return f.name == name })
		if i < 0 {
			return []byte("null")
		}
		return mustMarshal(fields[i].value)
	}
	names := after
	if after == nil {
		names = before
	}
	for _, f := range names {
		oldJSON, newJSON := valueJSON(before, f.name), valueJSON(after, f.name)
		if !bytes.Equal(oldJSON, newJSON) {
			change := [2]json.RawMessage{digestLongValue(oldJSON), digestLongValue(newJSON)}
			out = append(out, auditField{f.name, change})
		}
	}
	return out
}

// auditTime returns a time in the form that /manage uses.
func auditTime(ms *int64) any {
	if ms == nil {
		return nil
	}
	return time.UnixMilli(*ms).UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

func digestLongValue(value []byte) []byte {
	if len(value) <= maxAuditValueBytes {
		return value
	}
	hash := sha256.Sum256(value)
	return fmt.Appendf(nil, `{"bytes":%d,"sha256":"%x"}`, len(value), hash)
}

// detailJSON returns the detail as a JSON object.
func (a *auditEvent) detailJSON() string {
	out := []byte("{")
	for i, f := range a.detail {
		if i > 0 {
			out = append(out, ',')
		}
		value := []byte(mustMarshal(f.value))
		if len(value) > 3*maxAuditValueBytes { // the values of a pair have been shortened already
			value = digestLongValue(value)
		}
		out = append(append(out, mustMarshal(f.name)...), ':')
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

// An auditHead names the last entry. Without it, the removal of the last entries could not be detected.
type auditHead struct {
	seq int64
	mac []byte
}

// String returns the form that an operator keeps elsewhere, to compare with later.
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

// An auditChain makes and checks the MACs. It has a random key of its own, sealed with the encryption key,
// so that the chain survives a change of the encryption key.
type auditChain struct{ key secret }

// newAuditChain returns a chain with a new key, and that key, sealed.
func newAuditChain(sl *sealer) (*auditChain, string, error) {
	text := newEncryptionKey()
	c, err := deriveAuditChain(text)
	return c, base64.StdEncoding.EncodeToString(sl.seal(text, auditKeyContext)), err
}

// openAuditChain returns the chain with a sealed key.
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

// mac returns the MAC of a label, numbers and texts. The length of each text precedes it, so that no two
// lists of texts are the same bytes.
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
	return c.mac("entry", []int64{e.seq, e.at},
		e.actorID, string(e.role), e.address, e.requestID, e.action, e.object, e.detail, string(e.prev))
}

// signHead returns a head in its stored form. verifyHead reads that, and returns false if it was not signed
// with this chain's key.
func (c *auditChain) signHead(h auditHead) string {
	return h.String() + ":" + hex.EncodeToString(c.mac("head", []int64{h.seq}, string(h.mac)))
}

func (c *auditChain) verifyHead(stored string) (auditHead, bool) {
	text := stored[:max(strings.LastIndexByte(stored, ':'), 0)]
	h, err := parseAuditHead(text)
	return h, err == nil && hmac.Equal([]byte(c.signHead(h)), []byte(stored))
}

// appendEntry makes e the successor of the entry that h names, and returns the new head. A chain begins after
// emptyAuditHead. So does an entry whose predecessor is missing or was changed: the break remains visible.
func (c *auditChain) appendEntry(h auditHead, e *auditEntry) auditHead {
	e.seq, e.prev = h.seq+1, h.mac
	e.mac = c.entryMAC(e)
	return auditHead{e.seq, e.mac}
}

func emptyAuditHead(seq int64) auditHead { return auditHead{seq, make([]byte, sha256.Size)} }

// An auditCheck checks a trail from its first entry to its head.
type auditCheck struct {
	chain           *auditChain
	lastHead        auditHead // of the previous entry
	firstEntry      auditEntry
	newestAt        int64 // at of the newest entry
	expectedHead    *auditHead
	expectedFound   bool // the trail has the expected entry
	problems        []string
	omittedProblems int   // how many problems beyond maxAuditProblems were left out
	firstProblemSeq int64 // the lowest seq that has one
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

// add checks the next entry.
func (k *auditCheck) add(e *auditEntry) {
	want := k.lastHead.seq + 1
	if e.seq < want { // before the first entry: no two rows have the same seq
		k.addProblem(e.seq, "entry %d was not written by this program", e.seq)
		return
	}
	if e.seq > want {
		k.addMissing(want, e.seq-1)
	}
	if !hmac.Equal(k.chain.entryMAC(e), e.mac) {
		k.addProblem(e.seq, "entry %d was changed, or was not written by this program", e.seq)
	} else if e.seq == want && !hmac.Equal(e.prev, k.lastHead.mac) {
		k.addProblem(e.seq, "entry %d was not written after the present entry %d", e.seq, k.lastHead.seq)
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

// finish compares the trail with its head, after all entries up to it were added. ok means that this program
// wrote the head. newest is the seq of the last row.
func (k *auditCheck) finish(h auditHead, ok bool, newest int64) {
	switch {
	case !ok:
		k.addProblem(k.lastHead.seq+1, "the record of the last entry is missing or was changed: "+
			"it cannot be checked whether entries after %d were removed", k.lastHead.seq)
	case h.seq > k.lastHead.seq:
		k.addMissing(k.lastHead.seq+1, h.seq)
	case !hmac.Equal(h.mac, k.lastHead.mac):
		k.addProblem(h.seq, "entry %d is not the one that was written as the last", h.seq)
	}
	if ok && newest > h.seq {
		k.addProblem(h.seq+1, "there are entries after %d, which was the last", h.seq)
	}
	if k.expectedHead != nil && !k.expectedFound {
		k.addProblem(k.expectedHead.seq, "entry %d is not the one that was noted", k.expectedHead.seq)
	}
}

func (k *auditCheck) intact() bool { return len(k.problems) == 0 }

// String summarizes an intact trail.
func (k *auditCheck) String() string {
	day := func(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }
	return fmt.Sprintf("%d entries, from %s to %s", k.lastHead.seq, day(k.firstEntry.at), day(k.newestAt))
}

// priorUseNotice says what the trail does not cover because the database was in use before it began, "" if
// it was new.
func (k *auditCheck) priorUseNotice() string {
	var initial struct {
		Projects, Tokens int64
		Keys             int64 `json:"management_keys"`
	}
	if json.Unmarshal([]byte(k.firstEntry.detail), &initial) != nil ||
		initial.Projects+initial.Tokens+initial.Keys == 0 {
		return ""
	}
	return fmt.Sprintf("The trail begins in a database that already had %d projects, %d tokens and "+
		"%d management keys: either an upgrade from a version without a trail, or somebody removed the whole "+
		"trail before.",
		initial.Projects, initial.Tokens, initial.Keys)
}
