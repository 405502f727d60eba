// This file stores the content of calls, for projects whose policy asks for it: the first bytes of the request
// body and of the answer. It seals them before anything else sees them. It uses no table and no URL.
package main

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
)

// A storedBody is the start of a request body or of an answer.
type storedBody struct {
	bytes []byte
	size  int64 // of the whole body
	full  bool  // nothing more is stored
}

// A storedContent is the content of a running call. It belongs to the call's goroutine. nil stores nothing.
type storedContent struct {
	memory            *bodyShare // of its call
	maxBytes          int64      // of each body
	expiresAt         int64      // unix milliseconds
	request, response storedBody
}

func (sc *storedContent) add(b *storedBody, p []byte) {
	b.size += int64(len(p))
	n := min(sc.maxBytes-int64(len(b.bytes)), int64(len(p)))
	if b.full || n == 0 {
		return
	}
	if have, need := int64(cap(b.bytes)), int64(len(b.bytes))+n; need > have {
		size := min(max(need, 2*have), sc.maxBytes)
		if sc.memory.reserve(size-have) != nil { // request bodies have precedence
			b.full = true
			return
		}
		b.bytes = append(make([]byte, 0, size), b.bytes...)
	}
	b.bytes = append(b.bytes, p[:n]...)
}

// addResponse stores bytes of the answer as they go to the client.
func (sc *storedContent) addResponse(p []byte) {
	if sc != nil {
		sc.add(&sc.response, p)
	}
}

// A contentKey seals stored content. Each call gets a key of its own, derived from the root key: the number of
// calls is not bounded, and one AES-GCM key is safe for a bounded number of messages only. The root key is random
// and is sealed with the encryption key, so that changing the latter leaves stored content as it is.
type contentKey struct{ root secret }

// openContentKey returns the database's content key, and makes one the first time.
func openContentKey(ctx context.Context, st *store, sl *sealer) (*contentKey, error) {
	text, err := st.setting(ctx, contentKeySetting)
	if errors.Is(err, errNotFound) {
		root := newEncryptionKey()
		sealed := base64.StdEncoding.EncodeToString(sl.seal(root, contentKeyContext))
		return &contentKey{root}, st.setSetting(ctx, contentKeySetting, sealed)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the content key: %w", err)
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("opening the content key: %w", errUnseal)
	}
	root, err := sl.open(sealed, contentKeyContext)
	if err != nil {
		return nil, fmt.Errorf("opening the content key: %w", err)
	}
	return &contentKey{root}, nil
}

// derive returns 32 bytes for one purpose.
func (k *contentKey) derive(purpose string) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, []byte(k.root()), nil, "llm-proxy "+purpose, 32)
	if err != nil {
		return nil, fmt.Errorf("deriving a content key: %w", err)
	}
	return key, nil
}

// sealerFor returns the sealer for one purpose: the content of one call, or one cached answer.
func (k *contentKey) sealerFor(purpose string) (*sealer, error) {
	key, err := k.derive(purpose)
	if err != nil {
		return nil, err
	}
	return newSealer(key)
}

func contentPurpose(callID int64) string { return "content v1|" + formatRequestID(callID) }

// sealCached encrypts a cached answer. Only openCached with the same context, which names the project and the cache
// key, decrypts it.
func (k *contentKey) sealCached(context string, plain []byte) ([]byte, error) {
	sl, err := k.sealerFor("cache v1|" + context)
	if err != nil {
		return nil, err
	}
	return sl.seal(newSecret(string(plain)), context), nil
}

// openCached decrypts a value from sealCached.
func (k *contentKey) openCached(context string, sealed []byte) ([]byte, error) {
	sl, err := k.sealerFor("cache v1|" + context)
	if err != nil {
		return nil, err
	}
	plain, err := sl.open(sealed, context)
	if err != nil {
		return nil, err
	}
	return []byte(plain()), nil
}

// hashEndUser returns the name under which an end user is recorded in a project whose policy asks for hashes: nobody
// can try names without the root key, and changing the encryption key leaves it as it is.
func (k *contentKey) hashEndUser(project, name string) (string, error) {
	key, err := k.derive("end users v1|" + project)
	if err != nil {
		return "", err
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(name))
	return endUserHashPrefix + hex.EncodeToString(mac.Sum(nil)[:16]), nil
}

const (
	requestPart  = "request"
	responsePart = "answer"
)

// seal returns the row that stores sc.
func (k *contentKey) seal(callID, project int64, sc *storedContent) (*contentRow, error) {
	sl, err := k.sealerFor(contentPurpose(callID))
	if err != nil {
		return nil, err
	}
	return &contentRow{id: callID, project: project, expiresAt: sc.expiresAt,
		request: sl.seal(newSecret(string(sc.request.bytes)), requestPart), requestBytes: sc.request.size,
		response: sl.seal(newSecret(string(sc.response.bytes)), responsePart), responseBytes: sc.response.size}, nil
}

// open returns both bodies of a row in clear.
func (k *contentKey) open(row *contentRow) (request, answer secret, err error) {
	sl, err := k.sealerFor(contentPurpose(row.id))
	if err != nil {
		return nil, nil, err
	}
	if request, err = sl.open(row.request, requestPart); err != nil {
		return nil, nil, err
	}
	answer, err = sl.open(row.response, responsePart)
	return request, answer, err
}
