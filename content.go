// This room keeps what calls said and were answered, for projects whose policy
// asks for it; for all others it does nothing. What is kept is the first bytes of
// each body, sealed before it leaves this room. It knows no table and no URL.
package main

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
)

// A storedBody is the beginning of a request's body or an answer's.
type storedBody struct {
	bytes []byte
	size  int64 // of the whole
	full  bool  // no more is kept
}

// A storedContent is what is kept of a running call. The nil one keeps nothing. It
// belongs to the goroutine of the call.
type storedContent struct {
	memory            *bodyMemory // which it takes its memory from, as bodies do
	reserved          int64
	maxBytes          int64 // bytes of each body
	expiresAt         int64
	request, response storedBody
}

func (k *storedContent) add(b *storedBody, p []byte) {
	if k == nil {
		return
	}
	b.size += int64(len(p))
	n := min(k.maxBytes-int64(len(b.bytes)), int64(len(p)))
	if b.full || n == 0 {
		return
	}
	if !k.memory.reserve(n) { // calls go first
		b.full = true
		return
	}
	k.reserved += n
	b.bytes = append(b.bytes, p[:n]...)
}

// addResponse keeps bytes of the answer as they go to the client.
func (k *storedContent) addResponse(p []byte) {
	if k != nil {
		k.add(&k.response, p)
	}
}

func (k *storedContent) release() {
	if k != nil {
		k.memory.release(k.reserved)
	}
}

// A contentKey seals what is kept, each call with a key of its own derived from
// it: the number of calls has no bound that one AES-GCM key would be good for.
// It is random and itself sealed with the encryption key, so that a change of
// that need not touch what is kept.
type contentKey struct{ root secret }

// openContentKey returns the database's key, made at first.
func openContentKey(ctx context.Context, st *store, sl *sealer) (*contentKey, error) {
	text, err := st.setting(ctx, contentKeySetting)
	if errors.Is(err, errNotFound) {
		root := newEncryptionKey()
		sealed := base64.StdEncoding.EncodeToString(sl.seal(root, contentKeyContext))
		return &contentKey{root}, st.setSetting(ctx, contentKeySetting, sealed)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the key of kept content: %w", err)
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("the key of kept content: %w", errUnseal)
	}
	root, err := sl.open(sealed, contentKeyContext)
	if err != nil {
		return nil, fmt.Errorf("the key of kept content: %w", err)
	}
	return &contentKey{root}, nil
}

// sealerFor returns the sealer for one call.
func (k *contentKey) sealerFor(id int64) (*sealer, error) {
	key, err := hkdf.Key(sha256.New, []byte(k.root()), nil, "llm-proxy content v1|"+formatRequestID(id), 32)
	if err != nil {
		return nil, fmt.Errorf("deriving a content key: %w", err)
	}
	return newSealer(key)
}

const (
	requestPart  = "request"
	responsePart = "answer"
)

// seal returns what is to be stored of k.
func (k *contentKey) seal(id, project int64, c *storedContent) (*contentRow, error) {
	sl, err := k.sealerFor(id)
	if err != nil {
		return nil, err
	}
	return &contentRow{id: id, project: project, expiresAt: c.expiresAt,
		request: sl.seal(newSecret(string(c.request.bytes)), requestPart), requestBytes: c.request.size,
		response: sl.seal(newSecret(string(c.response.bytes)), responsePart), responseBytes: c.response.size}, nil
}

// open returns both bodies of a row.
func (k *contentKey) open(row *contentRow) (request, answer secret, err error) {
	sl, err := k.sealerFor(row.id)
	if err != nil {
		return nil, nil, err
	}
	if request, err = sl.open(row.request, requestPart); err != nil {
		return nil, nil, err
	}
	answer, err = sl.open(row.response, responsePart)
	return request, answer, err
}
